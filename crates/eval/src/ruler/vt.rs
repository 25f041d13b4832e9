//! Which variables have this value? A chain of assignments in noise, after a short one that is solved (task `vt`).

use std::ops::RangeInclusive;

use super::draw::Draw;
use super::fit::{self, Recipe};
use super::haystack::NOISE;

/// Variables of a chain: the first and four hops.
const VARIABLES: usize = 5;
/// Most tokens of the solved chain.
const EXAMPLE_TOKENS: usize = 500;

/// One chain in noise, with its question and the beginning of its answer.
struct Chain {
    variables: Vec<String>,
    value: usize,
    longest: usize,
    draw: Draw,
}

impl Chain {
    /// Variables of `letters` letters.
    fn new(letters: usize, longest: usize, draw: &mut Draw) -> Chain {
        let mut variables: Vec<String> = Vec::new();
        while variables.len() < VARIABLES {
            let name = draw.letters(letters, 'A');
            if !variables.contains(&name) {
                variables.push(name);
            }
        }
        let value = 10_000 + draw.below(89_999);
        Chain { variables, value, longest: longest.max(VARIABLES), draw: draw.fork() }
    }
}

impl Recipe for Chain {
    fn sizes(&self) -> RangeInclusive<usize> {
        VARIABLES..=self.longest
    }

    fn prompt(&self, size: usize) -> String {
        let places = self.draw.clone().ascending(size, VARIABLES);
        let mut lines = vec![NOISE.to_string(); size];
        for (hop, place) in places.into_iter().enumerate() {
            let line = match hop {
                0 => format!("VAR {} = {}", self.variables[0], self.value),
                hop => format!("VAR {} = VAR {} ", self.variables[hop], self.variables[hop - 1]),
            };
            lines.insert(place + hop, line);
        }
        format!(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{}\nQuestion: Find \
             all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of \
             variable assignment in the text above, {VARIABLES} variables are assigned the value {value}, they are: ",
            lines.join("\n"),
            value = self.value,
        )
    }

    fn answers(&self) -> Vec<String> {
        self.variables.clone()
    }
}

/// A solved chain, then one to solve.
pub(super) struct VariableTracking {
    example: String,
    chain: Chain,
}

impl VariableTracking {
    /// The solved chain has as much noise as 500 tokens hold.
    pub fn new(length: usize, mut draw: Draw, count: &mut dyn FnMut(&str) -> usize) -> VariableTracking {
        let solved = Chain::new(3, 4 * EXAMPLE_TOKENS, &mut draw);
        let mut chain = Chain::new(5, 4 * length, &mut draw);
        while chain.value == solved.value {
            chain.value = 10_000 + draw.below(89_999);
        }
        let text = fit::longest(&solved, EXAMPLE_TOKENS, count)
            .unwrap_or_else(|_| solved.prompt(*solved.sizes().start()));
        VariableTracking { example: format!("{text} {}\n\n", solved.variables.join(" ")), chain }
    }
}

impl Recipe for VariableTracking {
    fn sizes(&self) -> RangeInclusive<usize> {
        self.chain.sizes()
    }

    fn prompt(&self, size: usize) -> String {
        self.example.clone() + &self.chain.prompt(size)
    }

    fn answers(&self) -> Vec<String> {
        self.chain.answers()
    }
}

/// Where the first variable gets its value, in bytes.
pub(super) fn needle(prompt: &str, answers: &[String]) -> Option<usize> {
    prompt.find(&format!("VAR {} = ", answers.first()?))
}
