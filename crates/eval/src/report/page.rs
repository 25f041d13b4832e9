//! How do findings become Markdown, HTML and plain text?
//!
//! What is found is a list of [`Block`]s. Text in them is of untrusted origin and is escaped here, for each of the
//! three, and nowhere else. Plots are SVG that the plotting library escaped.

use std::fmt::Write;

/// Characters that a name may have in a report.
const LONGEST_NAME: usize = 200;

/// A part of a report.
pub(super) enum Block {
    /// A heading of level 1, 2 or 3.
    Heading(usize, String),
    Text(String),
    /// A command.
    Code(String),
    Table(Table),
    /// Plots that belong side by side.
    Plots(Vec<Plot>),
}

/// Rows of cells; a cell has lines. The first column is names.
pub(super) struct Table {
    pub(super) columns: Columns,
    pub(super) header: Vec<String>,
    pub(super) rows: Vec<Vec<Vec<String>>>,
}

/// What the columns after the first are.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Columns {
    /// To be compared from row to row.
    Numbers,
    Words,
}

/// A drawing.
pub(super) struct Plot {
    /// File name.
    pub(super) name: String,
    /// What it shows, in words.
    pub(super) alt: String,
    pub(super) svg: String,
}

/// A name without what could move a cursor, turn the direction of writing or flood the page.
pub(super) fn clean(text: &str) -> String {
    shorten(text, LONGEST_NAME)
}

/// As `clean`, of at most `limit` characters.
pub(super) fn shorten(text: &str, limit: usize) -> String {
    let harmless = |c: char| match c {
        '\t' | '\n' | '\r' => ' ',
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
            char::REPLACEMENT_CHARACTER
        }
        // Not characters in XML.
        '\u{fffe}' | '\u{ffff}' => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    let mut short: String = text.chars().take(limit).map(harmless).collect();
    if text.chars().nth(limit).is_some() {
        short.pop();
        short.push('…');
    }
    short
}

/// A file name's part: lower-case letters, digits and hyphens.
pub(super) fn slug(text: &str) -> String {
    let mut slug = String::new();
    for c in text.chars().take(60) {
        match c.to_ascii_lowercase() {
            c @ ('a'..='z' | '0'..='9') => slug.push(c),
            _ if slug.ends_with('-') || slug.is_empty() => {}
            _ => slug.push('-'),
        }
    }
    slug.trim_end_matches('-').to_owned()
}

/// GitHub's Markdown. Plots are files in `plot_folder`, which is empty or ends with `/`.
pub(super) fn markdown(blocks: &[Block], plot_folder: &str) -> String {
    let mut out = String::new();
    for block in blocks {
        match block {
            Block::Heading(level, text) => {
                _ = writeln!(out, "{} {}\n", "#".repeat(*level), escape_markdown(text));
            }
            Block::Text(text) => _ = writeln!(out, "{}\n", escape_markdown(text)),
            Block::Code(text) => {
                let ticks = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
                let fence = "`".repeat(ticks.max(2) + 1);
                _ = writeln!(out, "{fence}sh\n{text}\n{fence}\n");
            }
            Block::Table(table) => table.markdown(&mut out),
            Block::Plots(plots) => {
                for Plot { name, alt, .. } in plots {
                    _ = writeln!(out, "![{}](<{plot_folder}{name}>)\n", escape_markdown(alt));
                }
            }
        }
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

/// One page that needs nothing from elsewhere; the first heading is its title. It is well-formed XML too.
pub(super) fn html(blocks: &[Block]) -> String {
    let title = blocks.iter().find_map(|block| match block {
        Block::Heading(_, text) => Some(escape_html(text)),
        _ => None,
    });
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n\
         <title>{}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n",
        title.unwrap_or_default()
    );
    for block in blocks {
        match block {
            Block::Heading(level, text) => _ = writeln!(out, "<h{level}>{}</h{level}>", escape_html(text)),
            Block::Text(text) => _ = writeln!(out, "<p>{}</p>", escape_html(text)),
            Block::Code(text) => _ = writeln!(out, "<pre><code>{}</code></pre>", escape_html(text)),
            Block::Table(table) => table.html(&mut out),
            Block::Plots(plots) => {
                out.push_str("<div class=\"plots\">\n");
                for Plot { alt, svg, .. } in plots {
                    let label = format!("<svg role=\"img\" aria-label=\"{}\" ", escape_html(alt));
                    _ = writeln!(out, "<figure>{}</figure>", svg.replacen("<svg ", &label, 1));
                }
                out.push_str("</div>\n");
            }
        }
    }
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

/// For a terminal; plots are left out.
pub(super) fn text(blocks: &[Block]) -> String {
    let mut out = String::new();
    for block in blocks {
        match block {
            Block::Heading(_, text) | Block::Text(text) | Block::Code(text) => _ = writeln!(out, "{text}\n"),
            Block::Table(table) => table.text(&mut out),
            Block::Plots(_) => {}
        }
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

impl Table {
    fn markdown(&self, out: &mut String) {
        let mut line = |cells: Vec<String>| _ = writeln!(out, "| {} |", cells.join(" | "));
        line(self.header.iter().map(|cell| escape_markdown(cell)).collect());
        let right = |column: usize| column > 0 && self.columns == Columns::Numbers;
        let rule = |column: usize| if right(column) { "---:" } else { "---" }.to_owned();
        line((0..self.header.len()).map(rule).collect());
        for row in &self.rows {
            let cell = |lines: &Vec<String>| {
                let lines: Vec<String> = lines.iter().map(|line| escape_markdown(line)).collect();
                lines.join("<br>")
            };
            line(row.iter().map(cell).collect());
        }
        out.push('\n');
    }

    fn html(&self, out: &mut String) {
        let class = match self.columns {
            Columns::Numbers => "numbers",
            Columns::Words => "words",
        };
        _ = write!(out, "<div class=\"scroll\" tabindex=\"0\"><table class=\"{class}\">\n<thead><tr>");
        for cell in &self.header {
            _ = write!(out, "<th scope=\"col\">{}</th>", escape_html(cell));
        }
        out.push_str("</tr></thead>\n<tbody>\n");
        for row in &self.rows {
            out.push_str("<tr>");
            for (column, lines) in row.iter().enumerate() {
                let (open, close) = if column == 0 { ("th scope=\"row\"", "th") } else { ("td", "td") };
                let mut lines = lines.iter();
                let mut first = lines.next().map(|line| escape_html(line)).unwrap_or_default();
                if column == 0 {
                    // A format's name may be broken between its parameters.
                    first = first.replace(',', ",<wbr/>");
                }
                _ = write!(out, "<{open}>{first}");
                for line in lines {
                    _ = write!(out, "<small>{}</small>", escape_html(line));
                }
                _ = write!(out, "</{close}>");
            }
            out.push_str("</tr>\n");
        }
        out.push_str("</tbody>\n</table></div>\n");
    }

    fn text(&self, out: &mut String) {
        let header = self.header.clone();
        let rows = self.rows.iter().map(|row| row.iter().map(|lines| lines.join(" ")).collect());
        let rows: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        for row in &rows {
            let mut line = String::new();
            for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                _ = match column {
                    0 => write!(line, "{cell:<width$}"),
                    _ => write!(line, "  {cell:>width$}"),
                };
            }
            _ = writeln!(out, "{}", line.trim_end());
        }
        out.push('\n');
    }
}

fn escape_html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Text that Markdown leaves alone: names with underscores and intervals in brackets stay readable.
fn escape_markdown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut before = ' ';
    for (at, c) in text.char_indices() {
        let after = text[at + c.len_utf8()..].chars().next().unwrap_or(' ');
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '_' if before.is_alphanumeric() && after.is_alphanumeric() => out.push('_'),
            // A bracket followed by a number is an interval; "[text](url)" and "[text]:" need the closing one.
            ']' if matches!(after, '(' | '[' | ':') => out.push_str("\\]"),
            '\\' | '`' | '*' | '_' | '|' | '~' => {
                out.push('\\');
                out.push(c);
            }
            '!' if after == '[' => out.push_str("\\!"),
            // A list, a heading or a rule is made at the start of a line only.
            '#' | '+' | '-' if at == 0 && after == ' ' => {
                out.push('\\');
                out.push(c);
            }
            c => out.push(c),
        }
        before = c;
    }
    out
}

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --page: #fff; --line: #d0d7de; --band: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --page: #0d1117; --line: #30363d; --band: #161b22 }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.35rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1.1rem; margin-top: 2rem }
p { max-width: 60rem; overflow-wrap: anywhere }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th:first-child, .words th, .words td { text-align: left } .numbers td { white-space: nowrap }
.words td { overflow-wrap: anywhere }
thead th { background: var(--band); white-space: nowrap } tbody th { font-weight: 500; min-width: 11rem; overflow-wrap: break-word }
small { display: block; color: var(--soft) }
pre { background: var(--band); padding: .8rem; overflow-x: auto; border-radius: 6px }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; max-width: 100%; box-sizing: border-box }
svg { display: block; max-width: 100%; height: auto }
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_keeps_names_and_intervals_and_nothing_else() {
        for (text, wanted) in [
            ("niah_single_1", "niah_single_1"),
            ("-3.2 [-6.0, -0.5]", "-3.2 [-6.0, -0.5]"),
            ("packed:kept=0.25,group=1", "packed:kept=0.25,group=1"),
            ("a|b", "a\\|b"),
            ("<b>&", "&lt;b&gt;&amp;"),
            ("[x](javascript:alert(1))", "[x\\](javascript:alert(1))"),
            ("![x](y)", "\\![x\\](y)"),
            ("_a_ *b* `c` \\", "\\_a\\_ \\*b\\* \\`c\\` \\\\"),
            ("# x", "\\# x"),
        ] {
            assert_eq!(escape_markdown(text), wanted);
        }
    }

    #[test]
    fn names_cannot_steer_a_terminal_or_a_path() {
        assert_eq!(clean("a\u{1b}[2Jb\u{202e}c\nd\0"), "a\u{fffd}[2Jb\u{fffd}c d\u{fffd}");
        assert_eq!(shorten("abcdef", 4), "abc…");
        assert_eq!(shorten("abcd", 4), "abcd");
        assert_eq!(slug("../../etc/Passwd.. x"), "etc-passwd-x");
        assert_eq!(slug("../"), "");
    }

    #[test]
    fn a_command_cannot_end_its_own_fence() {
        let out = markdown(&[Block::Code("echo ```` `".into())], "");
        assert_eq!(out, "`````sh\necho ```` `\n`````\n");
    }
}
