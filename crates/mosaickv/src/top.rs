//! `mosaickv top`: what a running server does, in a terminal; the page's twin.

use anyhow::{Context, Result, bail};
use clap::Args;
use mosaickv_kv::ByteCount;
use mosaickv_server::Live;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Gauge, Paragraph, Row, Sparkline, Table, TableState};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::time::{Duration, Instant};

/// Looks that the line of tokens a second remembers.
const HISTORY: usize = 200;

#[derive(Args)]
#[command(after_help = "Keys: up and down choose a request, c cancels it, q ends.\n\nExamples:\n  \
    mosaickv top\n  \
    mosaickv top http://127.0.0.1:8080 --api-key secret\n  \
    mosaickv top --once")]
pub struct TopArgs {
    /// Where the server is
    #[arg(default_value = "http://127.0.0.1:8000", env = "MOSAICKV_URL")]
    url: String,
    /// A key, if it wants one
    #[arg(long, env = "MOSAICKV_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
    /// Seconds between two looks
    #[arg(long, default_value = "1", value_name = "SECONDS", value_parser = crate::serve::seconds)]
    every: Duration,
    /// Print what there is as text, and end
    #[arg(long)]
    once: bool,
}

pub fn top(args: &TopArgs) -> Result<()> {
    let server = Server::new(args);
    // The first look is before the screen changes: an address that is wrong says so where it can be read.
    let live = server.look()?;
    if args.once {
        return Ok(write(&mut io::stdout().lock(), &live)?);
    }
    let mut terminal = ratatui::try_init().context("top needs a terminal; --once prints text")?;
    let done = run(&mut terminal, &server, args.every.max(Duration::from_millis(100)), View::new(live));
    ratatui::restore();
    done
}

/// A server, and how it is asked.
struct Server {
    url: String,
    key: Option<String>,
    agent: ureq::Agent,
}

impl Server {
    fn new(args: &TopArgs) -> Server {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(10)))
            .build()
            .new_agent();
        Server { url: args.url.trim_end_matches('/').to_owned(), key: args.api_key.clone(), agent }
    }

    fn with_key<Any>(&self, request: ureq::RequestBuilder<Any>) -> ureq::RequestBuilder<Any> {
        match &self.key {
            Some(key) => request.header("authorization", format!("Bearer {key}")),
            None => request,
        }
    }

    fn look(&self) -> Result<Live> {
        let request = self.with_key(self.agent.get(format!("{}/v1/kv/live", self.url)));
        let answer = request.call().with_context(|| {
            format!("no server answers at {}; start one with `mosaickv serve`, or name its address", self.url)
        })?;
        let text = said(&self.url, answer)?;
        serde_json::from_str(&text).with_context(|| format!("{} is no MosaicKV of this version", self.url))
    }

    fn cancel(&self, slot: usize, task: u64) -> Result<()> {
        let url = format!("{}/slots/{slot}?action=cancel&task={task}", self.url);
        let request = self.with_key(self.agent.post(url));
        said(&self.url, request.send_empty()?).map(|_| ())
    }
}

/// What an answer says; an error if it is none.
fn said(url: &str, mut answer: ureq::http::Response<ureq::Body>) -> Result<String> {
    let status = answer.status().as_u16();
    let text = answer.body_mut().read_to_string()?;
    match status {
        200 => Ok(text),
        401 => bail!("{url} wants a key; give it with --api-key"),
        _ => bail!("{url} answers {status}: {}", text.chars().take(200).collect::<String>()),
    }
}

/// What is on the screen.
struct View {
    live: Live,
    at: Instant,
    /// Tokens answered a second, the newest first.
    rates: VecDeque<u64>,
    chosen: TableState,
    /// What went wrong last.
    trouble: Option<String>,
}

impl View {
    fn new(live: Live) -> View {
        let chosen = TableState::default().with_selected(Some(0));
        View { live, at: Instant::now(), rates: VecDeque::new(), chosen, trouble: None }
    }

    fn update(&mut self, looked: Result<Live>) {
        let live = match looked {
            Ok(live) => live,
            Err(error) => return self.trouble = Some(format!("{error:#}")),
        };
        let tokens = live.output_tokens.saturating_sub(self.live.output_tokens);
        let rate = tokens as f64 / self.at.elapsed().as_secs_f64().max(1e-3);
        self.rates.push_front(rate.round() as u64);
        self.rates.truncate(HISTORY);
        (self.live, self.at, self.trouble) = (live, Instant::now(), None);
    }
}

fn run(
    terminal: &mut ratatui::DefaultTerminal,
    server: &Server,
    every: Duration,
    mut view: View,
) -> Result<()> {
    loop {
        terminal.draw(|frame| draw(frame, &mut view))?;
        let next = view.at + every;
        while event::poll(next.saturating_duration_since(Instant::now()))? {
            let Event::Key(key) = event::read()? else { break };
            if key.kind != KeyEventKind::Press {
                continue;
            }
            match key.code {
                KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
                KeyCode::Up => view.chosen.select_previous(),
                KeyCode::Down => view.chosen.select_next(),
                KeyCode::Char('c') => {
                    let chosen = view.chosen.selected().and_then(|i| view.live.requests.get(i));
                    if let Some((slot, Some(task))) = chosen.map(|request| (request.id, request.id_task)) {
                        view.trouble = server.cancel(slot, task).err().map(|error| format!("{error:#}"));
                    }
                }
                _ => {}
            }
            terminal.draw(|frame| draw(frame, &mut view))?;
        }
        let looked = server.look();
        view.update(looked);
        // Where nobody answers the clock goes on all the same.
        view.at = Instant::now();
    }
}

fn draw(frame: &mut Frame, view: &mut View) {
    let qualities = view.live.shadows.len() as u16;
    let [head, bytes, speed, quality, requests, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(3),
        Constraint::Length(6),
        Constraint::Length(if qualities == 0 { 0 } else { qualities + 2 }),
        Constraint::Min(4),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let live = &view.live;
    frame
        .render_widget(Paragraph::new(headline(live)).style(Style::new().add_modifier(Modifier::BOLD)), head);
    let share = live.stored_bytes as f64 / live.budget_bytes.max(1) as f64;
    let gauge = Gauge::default().block(Block::bordered().title("Bytes")).ratio(share.clamp(0.0, 1.0));
    frame.render_widget(gauge.label(of_bytes(live)), bytes);
    let title = format!("Tokens a second: {}", view.rates.front().copied().unwrap_or(0));
    let rates: Vec<u64> = view.rates.iter().copied().take(speed.width.into()).rev().collect();
    frame.render_widget(Sparkline::default().block(Block::bordered().title(title)).data(&rates), speed);
    let lines: Vec<Line> = live.shadows.iter().map(|shadow| Line::from(of_shadow(shadow))).collect();
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title("Quality")), quality);
    draw_requests(frame, view, requests);
    let keys = view.trouble.clone().unwrap_or_else(|| "up, down: choose   c: cancel   q: end".to_owned());
    frame.render_widget(Paragraph::new(keys), foot);
}

fn draw_requests(frame: &mut Frame, view: &mut View, area: Rect) {
    let rows = view.live.requests.iter().map(|request| {
        Row::new([
            request.id.to_string(),
            request.n_prompt_tokens.to_string(),
            request.n_decoded.to_string(),
            request.kv_format.clone().unwrap_or_default(),
            request.request_id.clone().unwrap_or_default(),
        ])
    });
    let widths = [5, 8, 9, 24].map(Constraint::Length).into_iter().chain([Constraint::Min(10)]);
    let names = Row::new(["slot", "prompt", "answered", "format", "request"]);
    let table = Table::new(rows, widths)
        .header(names.style(Style::new().add_modifier(Modifier::BOLD)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED))
        .block(Block::bordered().title("Requests"));
    frame.render_stateful_widget(table, area, &mut view.chosen);
}

fn headline(live: &Live) -> String {
    let more = match (live.preemptions, live.harder) {
        (0, 0) => String::new(),
        (preemptions, harder) => format!(", {preemptions} began again, {harder} compressed harder"),
    };
    format!("{} ({}): {} run, {} wait{more}", live.model, live.kv_format, live.running, live.waiting)
}

fn of_bytes(live: &Live) -> String {
    let bytes = |n: usize| {
        // Three digits say enough.
        let step = 10usize.pow(n.max(1).ilog10().saturating_sub(2));
        ByteCount(n / step * step).to_string()
    };
    format!(
        "{} stored ({} of them prompts kept for others), {} as f16, of {}",
        bytes(live.stored_bytes),
        bytes(live.prefix_bytes),
        bytes(live.exact_bytes),
        bytes(live.budget_bytes)
    )
}

fn of_shadow(shadow: &mosaickv_server::ShadowState) -> String {
    format!(
        "{}: the same best token as the exact cache {:.1} %, KL {:.4}, {} tokens",
        shadow.format,
        100.0 * shadow.top1,
        shadow.kl,
        shadow.steps
    )
}

/// The same as lines.
fn write(out: &mut impl Write, live: &Live) -> io::Result<()> {
    writeln!(out, "{}", headline(live))?;
    writeln!(out, "{}", of_bytes(live))?;
    for shadow in &live.shadows {
        writeln!(out, "{}", of_shadow(shadow))?;
    }
    for request in &live.requests {
        writeln!(
            out,
            "slot {}: {} + {} tokens, {}, {}",
            request.id,
            request.n_prompt_tokens,
            request.n_decoded,
            request.kv_format.as_deref().unwrap_or("-"),
            request.request_id.as_deref().unwrap_or("-")
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use serde_json::json;

    fn live() -> Live {
        let request = json!({
            "id": 3, "n_ctx": 8192, "is_processing": true, "id_task": 7, "request_id": "mine", "n_prompt_tokens": 5600,
            "n_decoded": 41, "kv_format": "layered:6",
        });
        serde_json::from_value(json!({
            "model": "m", "kv_format": "layered", "running": 1, "waiting": 2, "context": 8192, "budget_bytes": 1000000000,
            "reserved_bytes": 30000000, "stored_bytes": 250000000, "exact_bytes": 2000000000, "exact_bytes_per_token": 23040,
            "prefix_bytes": 12345678, "read_bytes": 5, "prompt_tokens": 5600, "output_tokens": 41, "preemptions": 0,
            "harder": 1, "shadows": [{"format": "layered", "steps": 31, "kl": 0.0123, "top1": 0.9677}], "requests": [request],
        }))
        .unwrap()
    }

    #[test]
    fn the_screen_tells_what_the_server_does() {
        let mut terminal = Terminal::new(TestBackend::new(110, 24)).unwrap();
        let mut view = View::new(live());
        view.update(Ok(Live { output_tokens: 81, ..live() }));
        terminal.draw(|frame| draw(frame, &mut view)).unwrap();
        let screen = terminal.backend().to_string();
        for part in [
            "m (layered): 1 run, 2 wait, 0 began again, 1 compressed harder",
            "250MB stored (12.3MB of them prompts kept for others), 2GB as f16, of 1GB",
            "96.8 %, KL 0.0123, 31 tokens",
            "layered:6",
            "mine",
            "c: cancel",
        ] {
            assert!(screen.contains(part), "no {part:?} in\n{screen}");
        }
        view.update(Err(anyhow::anyhow!("no server answers")));
        terminal.draw(|frame| draw(frame, &mut view)).unwrap();
        assert!(terminal.backend().to_string().contains("no server answers"));
        let mut text = vec![];
        write(&mut text, &live()).unwrap();
        assert!(String::from_utf8(text).unwrap().contains("slot 3: 5600 + 41 tokens, layered:6, mine"));
    }
}
