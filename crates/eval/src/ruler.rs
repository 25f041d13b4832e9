//! RULER (Hsieh et al. 2024, arXiv 2404.06654): needles, chains of variables, frequent words, questions.

/// The share of the answers that occur in the prediction, whatever their case (`string_match_all`).
pub fn match_all(_prediction: &str, _answers: &[String]) -> f64 {
    0.0
}

/// 1 if any of the answers occurs in the prediction, whatever their case (`string_match_part`).
pub fn match_part(_prediction: &str, _answers: &[String]) -> f64 {
    0.0
}
