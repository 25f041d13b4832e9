//! How are a request's keys and values kept, and what did that save?
//!
//! A request chooses in its JSON, in headers, or in the model's name; the first of them that says anything counts alone.

use crate::error::ApiError;
use crate::fields::KvFields;
use axum::http::HeaderMap;
use mosaickv_engine::Bill;
use mosaickv_kv::{KvFormat, Layered, Target};
use serde::Serialize;
use utoipa::ToSchema;

const FORMAT_HEADER: &str = "x-kv-format";
const RATIO_HEADER: &str = "x-kv-ratio";
const SUFFIX: &str = "@kv=";

/// The model's name and what follows `@kv=`, if anything does.
pub fn split_name(name: &str) -> (&str, Option<&str>) {
    match name.split_once(SUFFIX) {
        Some((name, format)) => (name, Some(format)),
        None => (name, None),
    }
}

/// The format that a request asks for, or else `default`.
pub fn choose(
    fields: Option<&KvFields>,
    headers: &HeaderMap,
    suffix: Option<&str>,
    default: KvFormat,
) -> Result<KvFormat, ApiError> {
    let header = |name: &'static str| match headers.get(name).map(|value| value.to_str()) {
        None => Ok(None),
        Some(Ok(text)) => Ok(Some(text.trim().to_owned())),
        Some(Err(_)) => Err(ApiError::invalid(name, format!("The header {name} is not ASCII text."))),
    };
    let in_json = fields.filter(|kv| {
        kv.format.is_some() || kv.ratio.is_some() || kv.budget_bytes.is_some() || kv.select.is_some()
    });
    if let Some(kv) = in_json {
        return from_json(kv, default);
    }
    let (format, ratio) = (header(FORMAT_HEADER)?, header(RATIO_HEADER)?);
    if format.is_some() || ratio.is_some() {
        let parsed = |text: String| {
            text.parse()
                .map_err(|_| ApiError::invalid(RATIO_HEADER, format!("{text:?} is not a ratio such as 6.")))
        };
        let kv = KvFields { format, ratio: ratio.map(parsed).transpose()?, ..KvFields::default() };
        let (format, budget) = (FORMAT_HEADER, RATIO_HEADER);
        return apply(&kv, default, Names { format, ratio: budget, ..JSON });
    }
    suffix.map_or(Ok(default), |suffix| parse(suffix, "model"))
}

/// The format of a context that a request goes on from; the request may ask for no other.
pub fn of_context(asked: KvFormat, default: KvFormat, context: KvFormat) -> Result<KvFormat, ApiError> {
    if asked == context || asked == default {
        return Ok(context);
    }
    let message =
        format!("The context is kept as {context}, and the request asks for {asked}; leave that out.");
    Err(ApiError::invalid(JSON.format, message))
}

/// What the fields of a [`KvFields`] are called where they come from.
struct Names {
    format: &'static str,
    ratio: &'static str,
    budget: &'static str,
    select: &'static str,
}

const JSON: Names =
    Names { format: "kv.format", ratio: "kv.ratio", budget: "kv.budget_bytes", select: "kv.select" };

fn from_json(kv: &KvFields, default: KvFormat) -> Result<KvFormat, ApiError> {
    if kv.ratio.is_some() && kv.budget_bytes.is_some() {
        let message = "kv.ratio and kv.budget_bytes are two budgets; leave one of them out.";
        return Err(ApiError::invalid(JSON.budget, message));
    }
    apply(kv, default, JSON)
}

/// The format with its ratio, budget and selection. Those alone ask for the layered format, which has them.
fn apply(kv: &KvFields, default: KvFormat, names: Names) -> Result<KvFormat, ApiError> {
    let given = kv.format.as_deref().map(|text| parse(text, names.format)).transpose()?;
    let param = [
        (names.ratio, kv.ratio.is_some()),
        (names.budget, kv.budget_bytes.is_some()),
        (names.select, kv.select.is_some()),
    ]
    .into_iter()
    .find_map(|(name, is_given)| is_given.then_some(name));
    let Some(param) = param else { return Ok(given.unwrap_or(default)) };
    let mut layered = match (given, default) {
        (Some(KvFormat::Layered(layered)), _) | (None, KvFormat::Layered(layered)) => layered,
        (None, _) => Layered::default(),
        (Some(format), _) => {
            let message = format!("{param} is for the layered format, not for {format}.");
            return Err(ApiError::invalid(param, message));
        }
    };
    if let Some(ratio) = kv.ratio {
        layered.target = Target::Ratio(ratio);
    }
    if let Some(bytes) = kv.budget_bytes {
        layered.target = Target::Bytes(bytes);
    }
    if let Some(select) = &kv.select {
        layered.select = select.parse().map_err(|why| ApiError::invalid(names.select, why))?;
    }
    // Writing and reading it again checks its numbers.
    parse(&KvFormat::Layered(layered).to_string(), param)
}

fn parse(text: &str, param: &str) -> Result<KvFormat, ApiError> {
    text.parse().map_err(|why: String| ApiError::invalid(param, why))
}

/// What an answer's keys and values took, all choices together.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct KvReport {
    /// How they were kept.
    pub format: String,
    /// Bytes allocated at the end.
    pub stored_bytes: usize,
    /// Bytes that they would take as f16.
    pub exact_bytes: usize,
    /// `exact_bytes` over `stored_bytes`.
    pub ratio: f64,
    /// Bytes of them that a decode step read, in the mean; not there from a GPU, which does not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_bytes_per_step: Option<f64>,
    /// Seconds of compressing the prompt.
    pub compress_seconds: f64,
    /// Tokens of the prompt whose keys and values were there before.
    pub cached_tokens: usize,
    /// Whether bytes ran out and it was compressed harder than `format` says, as the server's --kv-floor lets it.
    pub compressed_harder: bool,
}

impl KvReport {
    /// Of answers with these bills, to prompts of which so many tokens were there before.
    pub fn new(format: KvFormat, bills: &[Bill], cached_tokens: usize) -> KvReport {
        let stored_bytes: usize = bills.iter().map(|bill| bill.kv_bytes).sum();
        let exact_bytes: usize = bills.iter().map(|bill| bill.exact_bytes).sum();
        let read: Vec<f64> = bills.iter().filter_map(|bill| bill.read_bytes_per_step).collect();
        KvReport {
            format: format.to_string(),
            stored_bytes,
            exact_bytes,
            ratio: if stored_bytes == 0 { 1.0 } else { exact_bytes as f64 / stored_bytes as f64 },
            read_bytes_per_step: (!read.is_empty()).then(|| read.iter().sum::<f64>() / read.len() as f64),
            compress_seconds: bills.iter().map(|bill| bill.compress.as_secs_f64()).sum(),
            cached_tokens,
            compressed_harder: bills.iter().any(|bill| bill.is_harder),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn chosen(
        json: &str,
        header: Option<(&'static str, &'static str)>,
        name: &str,
    ) -> Result<String, String> {
        let fields: KvFields = serde_json::from_str(json).unwrap();
        let mut headers = HeaderMap::new();
        if let Some((name, value)) = header {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let format = choose(Some(&fields), &headers, split_name(name).1, KvFormat::Exact);
        format.map(|format| format.to_string()).map_err(|e| e.body().error.param.unwrap())
    }

    #[test]
    fn the_first_that_says_anything_counts() {
        let header = Some(("x-kv-format", "packed"));
        assert_eq!(chosen("{\"format\":\"layered:4\"}", header, "m@kv=q8_0").unwrap(), "layered:4");
        assert_eq!(chosen("{\"report\":true}", header, "m@kv=q8_0").unwrap(), "packed");
        assert_eq!(chosen("{}", None, "m@kv=layered:6@mass=0.9").unwrap(), "layered:6@mass=0.9");
        assert_eq!(chosen("{}", Some(("x-kv-ratio", "4")), "m").unwrap(), "layered:4");
        assert_eq!(chosen("{}", None, "m").unwrap(), "exact");
    }

    #[test]
    fn ratios_and_budgets_are_layered_s() {
        assert_eq!(chosen("{\"ratio\":6}", None, "m").unwrap(), "layered:6");
        let all = "{\"format\":\"layered\",\"budget_bytes\":24000000,\"select\":\"all\"}";
        assert_eq!(chosen(all, None, "m").unwrap(), "layered:24MB@all");
        assert_eq!(chosen("{\"format\":\"exact\",\"ratio\":6}", None, "m").unwrap_err(), "kv.ratio");
        assert_eq!(chosen("{\"ratio\":0.5}", None, "m").unwrap_err(), "kv.ratio");
        assert_eq!(chosen("{\"ratio\":6,\"budget_bytes\":1}", None, "m").unwrap_err(), "kv.budget_bytes");
        assert_eq!(chosen("{\"select\":\"some\"}", None, "m").unwrap_err(), "kv.select");
        assert_eq!(chosen("{\"format\":\"zip\"}", None, "m").unwrap_err(), "kv.format");
        assert_eq!(chosen("{}", Some(("x-kv-ratio", "six")), "m").unwrap_err(), "x-kv-ratio");
        assert_eq!(chosen("{}", None, "m@kv=zip").unwrap_err(), "model");
    }
}
