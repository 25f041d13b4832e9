//! What did an answer save and cost?

use mosaickv_kv::{KvBytes, KvShape};
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// The bill of one answer. Bytes are bytes allocated, headers and padding included.
#[derive(Clone, Debug, Serialize)]
pub struct Bill {
    /// The KV format, as `--kv` takes it.
    pub kv: String,
    pub prompt_tokens: usize,
    pub output_tokens: usize,
    /// From the question to the first token of the answer.
    pub ttft_s: f64,
    /// Mean time between tokens; absent if there was one.
    pub tbt_s: Option<f64>,
    pub tokens_per_s: Option<f64>,
    /// Keys and values at the end of the answer.
    pub kv_bytes: usize,
    pub kv_bytes_exact_f16: usize,
    /// Exact f16 bytes to stored bytes.
    pub ratio: f64,
    pub bits_per_scalar: f64,
    /// What is to be said if the prompt took other bytes than were asked for, or reached another ratio.
    pub budget_missed: Option<String>,
    /// Mean over the answer's decode steps.
    pub kv_bytes_read_per_step: Option<f64>,
    /// Share of the decode steps' time spent storing and attending to keys and values.
    pub attention_share: Option<f64>,
    /// Largest resident set of the process so far.
    pub peak_rss_bytes: Option<u64>,
}

/// What was measured over the decode steps of an answer.
pub struct DecodeTotals {
    pub steps: usize,
    pub time: Duration,
    pub attention: Duration,
    /// `None` on a GPU, where neither this nor attention's time is known.
    pub kv_bytes_read: Option<u64>,
}

impl Bill {
    pub fn new(kv: String, (shape, tokens): (KvShape, usize), bytes: KvBytes) -> Bill {
        let (stored, exact) = (bytes.total(), shape.exact_bytes(tokens));
        Bill {
            kv,
            prompt_tokens: 0,
            output_tokens: 0,
            ttft_s: 0.0,
            tbt_s: None,
            tokens_per_s: None,
            kv_bytes: stored,
            kv_bytes_exact_f16: exact,
            ratio: exact as f64 / stored as f64,
            bits_per_scalar: stored as f64 * 8.0 / shape.scalars(tokens) as f64,
            budget_missed: None,
            kv_bytes_read_per_step: None,
            attention_share: None,
            peak_rss_bytes: peak_rss(),
        }
    }

    /// Adds what the decode steps cost; nothing if there were none.
    pub fn add_decode(&mut self, totals: &DecodeTotals) {
        if totals.steps == 0 {
            return;
        }
        let (steps, time) = (totals.steps as f64, totals.time.as_secs_f64());
        self.tbt_s = Some(time / steps);
        self.tokens_per_s = Some(steps / time);
        self.kv_bytes_read_per_step = totals.kv_bytes_read.map(|read| read as f64 / steps);
        self.attention_share = totals.kv_bytes_read.map(|_| totals.attention.as_secs_f64() / time);
    }
}

impl fmt::Display for Bill {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        const MB: f64 = 1e6;
        writeln!(f, "kv {}: {} prompt + {} output tokens", self.kv, self.prompt_tokens, self.output_tokens)?;
        write!(f, "  time      first token {:.2} s", self.ttft_s)?;
        match (self.tbt_s, self.tokens_per_s) {
            (Some(tbt), Some(rate)) => writeln!(f, ", then {:.2} ms each ({rate:.1} tokens/s)", tbt * 1e3)?,
            _ => writeln!(f)?,
        }
        writeln!(
            f,
            "  KV bytes  {:.2} MB stored, {:.2} MB as exact f16: ratio {:.2}, {:.2} bits a scalar",
            self.kv_bytes as f64 / MB,
            self.kv_bytes_exact_f16 as f64 / MB,
            self.ratio,
            self.bits_per_scalar
        )?;
        if let Some(missed) = &self.budget_missed {
            writeln!(f, "  budget    {missed}")?;
        }
        if let (Some(read), Some(share)) = (self.kv_bytes_read_per_step, self.attention_share) {
            writeln!(
                f,
                "  a step    reads {:.2} MB of KV; attention takes {:.0} % of its time",
                read / MB,
                share * 100.0
            )?;
        }
        match self.peak_rss_bytes {
            Some(peak) => write!(f, "  process   {:.0} MB at its peak", peak as f64 / MB),
            None => write!(f, "  process   peak memory unknown on this system"),
        }
    }
}

/// Largest resident set so far, where the system tells.
pub fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
