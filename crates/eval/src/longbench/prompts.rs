//! What are the words of LongBench's prompts?
//!
//! From `config/dataset2prompt.json` of github.com/THUDM/LongBench, word for word, slips included ("asconcisely").
//! Copyright (c) 2023 THU-KEG & Zhipu AI, MIT licence (the terms of LICENSE-MIT at the root of this repository).

use super::Dataset::{self, *};

/// With the places `{context}` and, in most, `{input}`.
pub(super) fn template(dataset: Dataset) -> &'static str {
    match dataset {
        NarrativeQa => NARRATIVE_QA,
        Qasper => QASPER,
        MultiFieldQaEn => MULTI_FIELD_QA,
        HotpotQa | TwoWikiMqa | Musique => PASSAGES_QA,
        GovReport => GOV_REPORT,
        QmSum => QM_SUM,
        MultiNews => MULTI_NEWS,
        Trec => TREC,
        TriviaQa => TRIVIA_QA,
        SamSum => {
            "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}"
        }
        PassageCount => PASSAGE_COUNT,
        PassageRetrievalEn => PASSAGE_RETRIEVAL,
        Lcc => "Please complete the code given below. \n{context}Next line of code:\n",
        RepoBenchP => "Please complete the code given below. \n{context}{input}Next line of code:\n",
    }
}

const NARRATIVE_QA: &str = concat!(
    "You are given a story, which can be either a novel or a movie script, and a question. Answer the question ",
    "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n",
    "Story: {context}\n\n",
    "Now, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do not ",
    "provide any explanation.\n\n",
    "Question: {input}\n\nAnswer:",
);

const QASPER: &str = concat!(
    "You are given a scientific article and a question. Answer the question as concisely as you can, using a single ",
    "phrase or sentence if possible. If the question cannot be answered based on the information in the article, ",
    "write \"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not ",
    "provide any explanation.\n\n",
    "Article: {context}\n\n",
    " Answer the question based on the above article as concisely as you can, using a single phrase or sentence if ",
    "possible. If the question cannot be answered based on the information in the article, write \"unanswerable\". If ",
    "the question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.\n\n",
    "Question: {input}\n\nAnswer:",
);

const MULTI_FIELD_QA: &str = concat!(
    "Read the following text and answer briefly.\n\n{context}\n\n",
    "Now, answer the following question based on the above text, only give me the answer and do not output any other ",
    "words.\n\nQuestion: {input}\nAnswer:",
);

const PASSAGES_QA: &str = concat!(
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n",
    "The following are given passages.\n{context}\n\n",
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n",
    "Question: {input}\nAnswer:",
);

const GOV_REPORT: &str = concat!(
    "You are given a report by a government agency. Write a one-page summary of the report.\n\n",
    "Report:\n{context}\n\n",
    "Now, write a one-page summary of the report.\n\nSummary:",
);

const QM_SUM: &str = concat!(
    "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or ",
    "more sentences.\n\n",
    "Transcript:\n{context}\n\n",
    "Now, answer the query based on the above meeting transcript in one or more sentences.\n\n",
    "Query: {input}\nAnswer:",
);

const MULTI_NEWS: &str = concat!(
    "You are given several news passages. Write a one-page summary of all news. \n\n",
    "News:\n{context}\n\n",
    "Now, write a one-page summary of all the news.\n\nSummary:",
);

const TREC: &str = concat!(
    "Please determine the type of the question below. Here are some examples of questions.\n\n",
    "{context}\n{input}",
);

const TRIVIA_QA: &str = concat!(
    "Answer the question based on the given passage. Only give me the answer and do not output any other words. The ",
    "following are some examples.\n\n{context}\n\n{input}",
);

const PASSAGE_COUNT: &str = concat!(
    "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read ",
    "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, ",
    "how many non-repeating paragraphs are there in total?\n\n{context}\n\n",
    "Please enter the final count of unique paragraphs after removing duplicates. The output format should only ",
    "contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
);

const PASSAGE_RETRIEVAL: &str = concat!(
    "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is ",
    "from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\n",
    "Please enter the number of the paragraph that the abstract is from. The answer format must be like ",
    "\"Paragraph 1\", \"Paragraph 2\", etc.\n\nThe answer is: ",
);
