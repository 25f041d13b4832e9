//! What did compression cost? Tasks, metrics, the run that pairs every method with the exact cache, and its report.
//!
//! A [`Sample`] is a prompt with known answers; [`ruler`] generates some and [`longbench`] reads some. A run reads
//! each prompt once and lets every KV format answer from a fork of that one cache. Nothing here knows how a format
//! stores its bytes.

#![deny(unsafe_code)]

mod error;
pub mod kl;
pub mod longbench;
mod malformed;
pub mod report;
pub mod results;
pub mod ruler;
pub mod run;
mod sample;

pub use error::EvalError;
pub use kl::{Document, Layers};
pub use malformed::Malformed;
pub use run::{Run, Times};
pub use sample::{Metric, Sample};
