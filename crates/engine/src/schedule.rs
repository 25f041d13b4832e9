//! Who reads which tokens in the next pass?
//!
//! Whoever is past its prompt reads one token, or if more are known as many of them as the pass has room for: however they
//! are cut, each is a step. What is left of the pass's tokens goes to prompts, in the order in which they were
//! admitted, in chunks that end at fixed places: a prompt is cut the same way whoever reads beside it, and so what it computes
//! is the same to the bit. At least one prompt goes on in every pass, and no step waits for a prompt.

use mosaickv_model::Part;
use std::ops::Range;

/// Prompts are cut at multiples of so many tokens.
pub(crate) const CHUNK_TOKENS: usize = 256;

/// Known tokens after its prompt that a request reads in a pass at most: beside others' steps they take long.
pub(crate) const STEPS_TOGETHER: usize = 64;

/// How far a request is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lag {
    /// Tokens read.
    pub(crate) read: usize,
    /// Tokens of its prompt.
    pub(crate) prompt: usize,
    /// Tokens that are known: of the prompt, given, and sampled.
    pub(crate) known: usize,
    /// Tokens of them that it may have read for which bytes are reserved, if it is past its prompt.
    pub(crate) granted: usize,
}

/// What one request reads.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Turn {
    /// Which of the requests.
    pub(crate) index: usize,
    /// Which of its tokens.
    pub(crate) tokens: Range<usize>,
    pub(crate) part: Part,
}

/// The turns of a pass of about `most` tokens: steps first, then prompts.
pub(crate) fn schedule(lags: &[Lag], most: usize) -> Vec<Turn> {
    let is_step = |lag: &Lag| lag.prompt <= lag.read && lag.read < lag.known;
    let steps = lags.iter().filter(|lag| is_step(lag)).count();
    let mut left = most.saturating_sub(steps);
    let mut turns = vec![];
    for (index, lag) in lags.iter().enumerate().filter(|(_, lag)| is_step(lag)) {
        let known = lag.known.min(lag.granted).saturating_sub(lag.read + 1);
        let more = known.min(STEPS_TOGETHER - 1).min(left);
        left -= more;
        turns.push(Turn { index, tokens: lag.read..lag.read + 1 + more, part: Part::Step });
    }
    for (index, lag) in lags.iter().enumerate().filter(|(_, lag)| lag.read < lag.prompt) {
        let end = ((lag.read / CHUNK_TOKENS + 1) * CHUNK_TOKENS).min(lag.prompt);
        let count = end - lag.read;
        if count > left && turns.len() > steps {
            break;
        }
        left = left.saturating_sub(count);
        let part = if end == lag.prompt { Part::PromptEnd } else { Part::Prompt };
        turns.push(Turn { index, tokens: lag.read..end, part });
    }
    turns
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lag(read: usize, prompt: usize, known: usize) -> Lag {
        Lag { read, prompt, known, granted: known }
    }

    #[test]
    fn steps_come_first_and_one_prompt_always_goes_on() {
        let lags = [lag(0, 700, 700), lag(50, 50, 51), lag(256, 300, 300), lag(9, 9, 9)];
        let step = Turn { index: 1, tokens: 50..51, part: Part::Step };
        let long = Turn { index: 0, tokens: 0..256, part: Part::Prompt };
        let short = Turn { index: 2, tokens: 256..300, part: Part::PromptEnd };
        assert_eq!(schedule(&lags, 512), [step.clone(), long.clone(), short]);
        assert_eq!(schedule(&lags, 257), [step.clone(), long.clone()]);
        assert_eq!(schedule(&lags, 1), [step, long]);
        assert_eq!(schedule(&lags[3..], 512), []);
    }

    #[test]
    fn known_tokens_are_read_together_as_far_as_there_is_room() {
        let given = Lag { granted: 90, ..lag(50, 50, 100) };
        let turn = |tokens| Turn { index: 0, tokens, part: Part::Step };
        assert_eq!(schedule(&[given], 512), [turn(50..90)]);
        assert_eq!(schedule(&[given], 10), [turn(50..60)]);
        assert_eq!(schedule(&[given, lag(5, 5, 6)], 3)[0], turn(50..52));
        assert_eq!(schedule(&[lag(50, 50, 500)], 512), [turn(50..50 + STEPS_TOGETHER)]);
        let prompt = Turn { index: 1, tokens: 0..20, part: Part::PromptEnd };
        assert_eq!(schedule(&[given, lag(0, 20, 20)], 1), [turn(50..51), prompt]);
    }

    /// A prompt is cut at the same places whatever the budget and whoever reads beside it.
    #[test]
    fn chunks_end_at_fixed_places() {
        for most in [1, 300, 512, 5000] {
            for others in 0..3 {
                let (mut read, mut ends) = (0, vec![]);
                while read < 1000 {
                    let mut lags = vec![lag(10, 10, 11); others];
                    lags.push(lag(read, 1000, 1000));
                    let turn = schedule(&lags, most).pop().unwrap();
                    assert_eq!((turn.index, turn.tokens.start), (others, read));
                    read = turn.tokens.end;
                    ends.push(read);
                }
                assert_eq!(ends, [256, 512, 768, 1000]);
            }
        }
    }
}
