//! How far did compression move the model's predictions? Means over predicted tokens, by text and by layer.

use super::number::{MeanCost, NONE, nats, nats_change, points, three_digits};
use super::page::{Block, Columns, Plot, Table, clean};
use super::plot::{Axes, Scale, Series, SeriesPoint, lines};
use super::{Axis, family};
use crate::results::KlRow;
use std::collections::HashSet;

pub(super) const EXPLANATION: &str = "KL (of the exact cache's next-token distribution from the compressed one's), \
    the change of the text's own negative log-likelihood (NLL) and NLL itself are means over the predicted tokens, in \
    nats; perplexity is exp(NLL); top-1 is the share of tokens whose most probable next token is the exact cache's. \
    Ratio (exact f16 bytes to stored), bits and MB are means over the rows.";

/// Rows of suite `kl`, apart by what they show.
pub(super) struct Divergences<'a> {
    kv: Axis<&'a str>,
    /// Whole caches: a title, and rows. Texts, then all of them, then needle prompts, then all of those.
    tables: Vec<(String, Vec<&'a KlRow>)>,
    /// One layer compressed.
    layers: Vec<&'a KlRow>,
    remarks: Vec<String>,
}

/// Means over predicted tokens.
struct MeanKl {
    cost: MeanCost,
    kl: f64,
    top1: f64,
    nll: f64,
    dnll: f64,
    tokens: f64,
    rows: usize,
}

impl MeanKl {
    /// None for no rows.
    fn of(rows: &[&KlRow]) -> Option<MeanKl> {
        let cost = MeanCost::of(rows.iter().map(|row| &row.cost))?;
        let tokens: f64 = rows.iter().map(|row| row.tokens as f64).sum();
        let over = |value: fn(&KlRow) -> f64| {
            rows.iter().map(|row| value(row) * row.tokens as f64).sum::<f64>() / tokens.max(1.0)
        };
        let (kl, top1) = (over(|row| row.kl), over(|row| row.top1));
        let (nll, dnll) = (over(|row| row.nll), over(|row| row.dnll));
        Some(MeanKl { cost, kl, top1, nll, dnll, tokens, rows: rows.len() })
    }
}

/// `NAME` of `NAME ask N`: a needle hidden in the text `NAME`.
fn needle_text(text: &str) -> Option<&str> {
    let (name, number) = text.rsplit_once(" ask ")?;
    (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(name)
}

impl<'a> Divergences<'a> {
    pub(super) fn new(rows: &[&'a KlRow]) -> Divergences<'a> {
        let kv = Axis::new(rows.iter().map(|row| row.kv.as_str()), 100);
        let (mut seen, places) = (HashSet::new(), kv.places());
        let known: Vec<&KlRow> =
            rows.iter().copied().filter(|row| places.contains_key(row.kv.as_str())).collect();
        let distinct: Vec<&KlRow> =
            known.iter().copied().filter(|row| seen.insert((&row.text, &row.kv, row.layer))).collect();
        let (layers, whole): (Vec<&KlRow>, Vec<&KlRow>) =
            distinct.iter().copied().partition(|row| row.layer.is_some());
        let (asks, texts): (Vec<&KlRow>, Vec<&KlRow>) =
            whole.into_iter().partition(|row| needle_text(&row.text).is_some());

        let mut remarks: Vec<String> = kv.left_out("KV formats").into_iter().collect();
        if known.len() > distinct.len() {
            let repeated = known.len() - distinct.len();
            remarks
                .push(format!("{repeated} rows repeat a text of the same format; the first of each counts."));
        }
        let mut tables = vec![];
        for (rows, asked) in [(texts, false), (asks, true)] {
            let name = |row: &&'a KlRow| match needle_text(&row.text) {
                Some(name) if asked => name,
                _ => row.text.as_str(),
            };
            let names = Axis::new(rows.iter().map(name), 50);
            remarks.extend(names.left_out("texts"));
            for of in &names.names {
                let title = if asked { format!("Needle prompts in {}", clean(of)) } else { clean(of) };
                tables.push((title, rows.iter().copied().filter(|row| name(row) == *of).collect()));
            }
            if names.names.len() > 1 {
                let title = if asked { "All needle prompts" } else { "All texts" };
                tables.push((title.to_owned(), rows));
            }
        }
        Divergences { kv, tables, layers, remarks }
    }

    /// Tables and plots; names of plots begin with `name`.
    pub(super) fn blocks(&self, name: &str) -> Vec<Block> {
        let mut blocks = vec![Block::Text(EXPLANATION.into())];
        blocks.extend(self.remarks.iter().cloned().map(Block::Text));
        for (at, (title, rows)) in self.tables.iter().enumerate() {
            blocks.push(Block::Heading(3, title.clone()));
            blocks.push(Block::Table(self.table(rows)));
            blocks.push(self.rate_quality(title, rows, format!("{name}-{}-kl.svg", at + 1)));
        }
        if !self.layers.is_empty() {
            blocks.push(Block::Heading(3, "One layer compressed, the others exact".into()));
            blocks.extend(self.by_layer(&format!("{name}-layers.svg")));
        }
        blocks
    }

    /// Tables for a terminal.
    pub(super) fn text_blocks(&self) -> Vec<Block> {
        let mut blocks: Vec<Block> = self.remarks.iter().cloned().map(Block::Text).collect();
        for (title, rows) in &self.tables {
            blocks.push(Block::Heading(3, title.clone()));
            blocks.push(Block::Table(self.table(rows)));
        }
        if !self.layers.is_empty() {
            blocks.push(Block::Heading(3, "KL, one layer compressed, the others exact".into()));
            blocks.push(Block::Table(self.layer_table(&self.layer_axis())));
        }
        blocks
    }

    /// A format's means among some rows, in the formats' order.
    fn means<'b>(&'b self, rows: &'b [&KlRow]) -> impl Iterator<Item = (&'a str, MeanKl)> + 'b {
        self.kv.names.iter().filter_map(move |&kv| {
            let rows: Vec<&KlRow> = rows.iter().copied().filter(|row| row.kv == kv).collect();
            Some((kv, MeanKl::of(&rows)?))
        })
    }

    fn table(&self, rows: &[&KlRow]) -> Table {
        let most = self.means(rows).map(|(_, mean)| mean.rows).max().unwrap_or(0);
        let names = ["KL", "top-1", "change of NLL", "perplexity"];
        let mut header = vec!["KV format".to_owned()];
        header.extend(names.into_iter().chain(MeanCost::HEADER).map(String::from));
        header.push("tokens".into());
        header.extend((most > 1).then(|| "prompts".to_owned()));
        let row = |(kv, mean): (&str, MeanKl)| {
            let top1 = format!("{} %", points(mean.top1));
            let mut row = vec![clean(kv), nats(mean.kl), top1, nats_change(mean.dnll)];
            row.push(three_digits(mean.nll.exp()));
            row.extend(mean.cost.cells());
            row.push(mean.tokens.to_string());
            let missing = mean.rows < most;
            let prompts = if missing { format!("{} of {most}", mean.rows) } else { most.to_string() };
            row.extend((most > 1).then_some(prompts));
            row.into_iter().map(|cell| vec![cell]).collect()
        };
        Table { columns: Columns::Numbers, header, rows: self.means(rows).map(row).collect() }
    }

    fn rate_quality(&self, title: &str, rows: &[&KlRow], name: String) -> Block {
        let mut series: Vec<Series> = vec![];
        for (kv, mean) in self.means(rows) {
            let point = SeriesPoint { x: mean.cost.ratio, y: mean.kl, bar: None };
            Series::add(&mut series, &clean(family(kv)), point);
        }
        // Formats that change nothing have no place on a logarithmic axis; in particular exact itself.
        series.retain(|series| series.points.iter().any(|point| point.y > 0.0));
        let title = format!("KL and ratio: {title}");
        let axes = Axes {
            title: &title,
            x: "ratio: exact f16 bytes / stored bytes",
            y: "mean KL (nats, logarithmic)",
            scale: Scale::Logarithmic,
            reference: None,
        };
        let alt = format!("{title}; a line a family of methods, lower is better");
        match lines(&axes, &series) {
            Ok(svg) => Block::Plots(vec![Plot { name, alt, svg }]),
            Err(why) => Block::Text(format!("No plot of KL and ratio: {why}.")),
        }
    }

    fn layer_axis(&self) -> Axis<usize> {
        let mut layers = Axis::new(self.layers.iter().filter_map(|row| row.layer), 200);
        layers.names.sort_unstable();
        layers
    }

    fn layer_table(&self, layers: &Axis<usize>) -> Table {
        let mut header = vec!["layer".to_owned()];
        let kv: Vec<&str> = self.means(&self.layers).map(|(kv, _)| kv).collect();
        header.extend(kv.iter().map(|kv| clean(kv)));
        let row = |&layer: &usize| {
            let rows: Vec<&KlRow> =
                self.layers.iter().copied().filter(|row| row.layer == Some(layer)).collect();
            let cell = |&kv: &&str| {
                let mean = self.means(&rows).find(|(name, _)| *name == kv);
                vec![mean.map_or(NONE.into(), |(_, mean)| nats(mean.kl))]
            };
            let mut row = vec![vec![layer.to_string()]];
            row.extend(kv.iter().map(cell));
            row
        };
        Table { columns: Columns::Numbers, header, rows: layers.names.iter().map(row).collect() }
    }

    fn by_layer(&self, name: &str) -> Vec<Block> {
        let layers = self.layer_axis();
        let mut series: Vec<Series> = vec![];
        for layer in &layers.names {
            let rows: Vec<&KlRow> =
                self.layers.iter().copied().filter(|row| row.layer == Some(*layer)).collect();
            for (kv, mean) in self.means(&rows) {
                let point = SeriesPoint { x: *layer as f64, y: mean.kl, bar: None };
                Series::add(&mut series, &clean(kv), point);
            }
        }
        series.retain(|series| series.points.iter().any(|point| point.y > 0.0));
        let axes = Axes {
            title: "KL when only this layer is compressed",
            x: "layer",
            y: "mean KL (nats, logarithmic)",
            scale: Scale::Logarithmic,
            reference: None,
        };
        let mut blocks: Vec<Block> = layers.left_out("layers").map(Block::Text).into_iter().collect();
        blocks.push(match lines(&axes, &series) {
            Ok(svg) => {
                let alt = "Mean KL by layer, when only that layer is compressed".to_owned();
                Block::Plots(vec![Plot { name: name.to_owned(), alt, svg }])
            }
            Err(why) => Block::Text(format!("No plot of KL by layer: {why}.")),
        });
        blocks.push(Block::Table(self.layer_table(&layers)));
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::needle_text;

    #[test]
    fn needles_are_told_from_texts() {
        assert_eq!(needle_text("alice ask 3"), Some("alice"));
        assert_eq!(needle_text("a ask 1 ask 12"), Some("a ask 1"));
        for text in ["alice", "ask 3", "alice ask ", "alice ask x", "alice ask -1"] {
            assert_eq!(needle_text(text), None, "{text}");
        }
    }
}
