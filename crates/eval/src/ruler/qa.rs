//! Which document has the answer? A question, its documents, and others (tasks `qa_1` and `qa_2`).

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::draw::Draw;
use super::fit::Recipe;

/// A question and numbers of documents.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Question {
    pub query: String,
    pub answers: Vec<String>,
    /// Documents that the answer is in; always given.
    pub needed: Vec<usize>,
    /// Documents on the same matter; given before any other.
    pub near: Vec<usize>,
}

/// Questions in the data set's order, and every document once.
#[derive(Clone, Debug, PartialEq, Default)]
pub(super) struct Questions {
    pub documents: Vec<String>,
    pub questions: Vec<Question>,
}

/// A question and the order in which documents join it.
pub(super) struct Asked {
    from: Arc<Questions>,
    index: usize,
    order: Vec<usize>,
    longest: usize,
    draw: Draw,
}

impl Asked {
    /// `None` if there is no such question.
    pub fn new(from: Arc<Questions>, index: usize, length: usize, mut draw: Draw) -> Option<Asked> {
        let question = from.questions.get(index)?;
        let mut near = question.near.clone();
        draw.shuffle(&mut near);
        let mut order = question.needed.clone();
        order.extend(near);
        let mut given = vec![false; from.documents.len()];
        for &document in &order {
            given[document] = true;
        }
        let mut others: Vec<usize> = (0..from.documents.len()).filter(|&i| !given[i]).collect();
        draw.shuffle(&mut others);
        order.extend(others);
        let longest = (4 * length).max(question.needed.len());
        Some(Asked { from, index, order, longest, draw })
    }

    fn question(&self) -> &Question {
        &self.from.questions[self.index]
    }
}

impl Recipe for Asked {
    fn sizes(&self) -> RangeInclusive<usize> {
        self.question().needed.len()..=self.longest
    }

    fn prompt(&self, size: usize) -> String {
        let mut chosen: Vec<usize> = self.order.iter().copied().cycle().take(size).collect();
        self.draw.clone().shuffle(&mut chosen);
        let document = |(i, document): (usize, &usize)| {
            format!("Document {}:\n{}", i + 1, self.from.documents[*document])
        };
        let documents: Vec<String> = chosen.iter().enumerate().map(document).collect();
        format!(
            "Answer the question based on the given documents. Only give me the answer and do not output any other \
             words.\n\nThe following are given documents.\n\n{}\n\nAnswer the question based on the given documents. \
             Only give me the answer and do not output any other words.\n\nQuestion: {} Answer:",
            documents.join("\n\n"),
            self.question().query
        )
    }

    fn answers(&self) -> Vec<String> {
        self.question().answers.clone()
    }
}
