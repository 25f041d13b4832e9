//! What did compression cost? Tasks, metrics, the run that pairs every method with the exact cache, and its report.
//!
//! A [`Sample`] is a prompt with known answers; [`ruler`] generates some and [`longbench`] reads some. A run reads
//! each prompt once and lets every KV format answer from a fork of that one cache. Nothing here knows how a format
//! stores its bytes.

#![deny(unsafe_code)]

pub mod longbench;
mod malformed;
pub mod report;
pub mod results;
pub mod ruler;
mod sample;

pub use malformed::Malformed;
pub use sample::{Metric, Sample};
