//! How are numbers written in a report?

use crate::results::Cost;

/// What stands where there is no number.
pub(super) const NONE: &str = "-";

/// A share of 1 as points of 100.
pub(super) fn points(share: f64) -> String {
    unsigned_zero(format!("{:.1}", 100.0 * share))
}

/// A change of a share, as points of 100 with a sign.
pub(super) fn change(share: f64) -> String {
    unsigned_zero(format!("{:+.1}", 100.0 * share))
}

/// A KL divergence or a likelihood, nats.
pub(super) fn nats(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        0.001.. => format!("{value:.4}"),
        _ => format!("{value:.1e}"),
    }
}

/// A change in nats, with a sign.
pub(super) fn nats_change(value: f64) -> String {
    unsigned_zero(format!("{value:+.4}"))
}

/// A positive number of any size, to three digits.
pub(super) fn three_digits(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        1e6.. => format!("{value:.2e}"),
        99.95.. => format!("{value:.0}"),
        9.995.. => format!("{value:.1}"),
        0.9995.. => format!("{value:.2}"),
        0.0001.. => format!("{value:.*}", (2 - value.abs().log10().floor() as i32).clamp(0, 6) as usize),
        _ => format!("{value:.2e}"),
    }
}

fn unsigned_zero(text: String) -> String {
    let zero = text.chars().all(|c| matches!(c, '+' | '-' | '0' | '.'));
    if zero { text.trim_start_matches(['+', '-']).to_owned() } else { text }
}

/// Means of what a format's caches held and read.
pub(super) struct MeanCost {
    /// Exact f16 bytes to stored bytes.
    pub(super) ratio: f64,
    end_ratio: Option<f64>,
    bits: f64,
    bytes_read: Option<f64>,
}

impl MeanCost {
    pub(super) const HEADER: [&str; 4] = ["ratio", "at the end", "bits a scalar", "MB read a step"];

    /// None for none.
    pub(super) fn of<'a>(costs: impl Iterator<Item = &'a Cost> + Clone) -> Option<MeanCost> {
        let ratio = mean(costs.clone().map(|cost| cost.ratio))?;
        let bits = mean(costs.clone().map(|cost| cost.bits_per_scalar))?;
        let end_ratio = mean(costs.clone().filter_map(|cost| cost.end_ratio));
        let bytes_read = mean(costs.filter_map(|cost| cost.bytes_read_per_step));
        Some(MeanCost { ratio, end_ratio, bits, bytes_read })
    }

    /// Under `HEADER`.
    pub(super) fn cells(&self) -> [String; 4] {
        let known = |number: Option<f64>| number.map_or(NONE.into(), three_digits);
        let megabytes = known(self.bytes_read.map(|bytes| bytes / 1e6));
        [three_digits(self.ratio), known(self.end_ratio), three_digits(self.bits), megabytes]
    }
}

/// None for none.
pub(super) fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_has_no_sign() {
        assert_eq!([change(-0.0001), change(0.0), change(-0.032)], ["0.0", "0.0", "-3.2"]);
        assert_eq!([points(-0.0), points(1.0), points(0.8549)], ["0.0", "100.0", "85.5"]);
        assert_eq!(
            [nats(0.0), nats(0.01234), nats(0.00012), nats(-1e-9)],
            ["0", "0.0123", "1.2e-4", "-1.0e-9"]
        );
        assert_eq!([nats_change(-0.00001), nats_change(0.5)], ["0.0000", "+0.5000"]);
    }

    #[test]
    fn three_digits_at_every_size() {
        let cases = [
            (0.0, "0"),
            (0.001234, "0.00123"),
            (0.1234, "0.123"),
            (1.234, "1.23"),
            (12.34, "12.3"),
            (99.96, "100"),
            (12345.6, "12346"),
            (1.5e9, "1.50e9"),
            (1e-9, "1.00e-9"),
        ];
        for (value, wanted) in cases {
            assert_eq!(three_digits(value), wanted);
        }
    }
}
