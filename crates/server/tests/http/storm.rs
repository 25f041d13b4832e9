//! Two thousand requests of all lengths, many of which are given up, within few bytes.

use crate::common::{Server, sample};
use mosaickv_engine::Settings;
use mosaickv_kv::{KvFormat, KvShape};
use mosaickv_server::Options;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const CLIENTS: u64 = 16;
const REQUESTS: usize = 2048;

/// Bytes of memory that the process has now, server and clients together.
fn resident() -> usize {
    let pages: usize =
        std::fs::read_to_string("/proc/self/statm").unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// What the tiny model's keys and values are like, in the server of 2,048 tokens.
fn shape() -> KvShape {
    let (mut model, _) = crate::common::tiny();
    model.config.context = 2048;
    model.kv_shape()
}

struct Draws(ChaCha8Rng);

impl Draws {
    fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n as u64) as usize
    }
}

/// One request, and what came of it: a status and an error code, or 0 if it was given up.
fn ask(address: SocketAddr, draws: &mut Draws) -> (u16, String) {
    let length = [20, 300, 1500, 2040][draws.below(4)];
    let length = 1 + draws.below(length);
    // Some begin alike.
    let first = draws.below(4);
    let prompt: Vec<usize> = (0..length).map(|i| 40 + (i * 7 + first) % 200).collect();
    let kv = ["exact", "packed", "snapkv"][draws.below(3)];
    let stream = draws.below(2) == 0;
    let body = json!({
        "prompt": prompt, "max_tokens": 1 + draws.below(60), "ignore_eos": true, "stream": stream, "n": 1 + draws.below(2),
        "kv": {"format": kv},
    });
    let body = body.to_string();
    let mut socket = TcpStream::connect(address).unwrap();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all((head + &body).as_bytes()).unwrap();
    if draws.below(3) == 0 {
        std::thread::sleep(Duration::from_millis(draws.below(40) as u64));
        return (0, String::new());
    }
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let status: u16 = answer.split(' ').nth(1).unwrap().parse().unwrap();
    if status == 200 && answer.contains("\"kv_memory_full\"") {
        return (status, "kv_memory_full".to_owned());
    }
    if status == 200 {
        assert!(!answer.contains("\"error\""), "an answer that failed: {answer}");
        assert!(!stream || answer.contains("data: [DONE]"), "a stream without an end");
        return (status, String::new());
    }
    let object = &answer[answer.find('{').unwrap()..=answer.rfind('}').unwrap()];
    let object: Value = serde_json::from_str(object).unwrap();
    (status, object["error"]["code"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn two_thousand_requests_leave_nothing_behind() {
    let kv_memory = KvFormat::Exact.most_prompt_bytes(shape(), 1500) * 5 / 4;
    let settings = Settings { kv_memory, most_sequences: 8, most_waiting: 20, ..Settings::default() };
    let server = Server::large(Options::default(), settings);
    let address = server.address;
    let round = |seed: u64, requests: usize| -> BTreeMap<(u16, String), usize> {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                std::thread::spawn(move || {
                    let mut draws = Draws(ChaCha8Rng::seed_from_u64(seed * 1000 + client));
                    (0..requests / CLIENTS as usize).map(|_| ask(address, &mut draws)).collect::<Vec<_>>()
                })
            })
            .collect();
        let mut outcomes = BTreeMap::new();
        for outcome in clients.into_iter().flat_map(|client| client.join().unwrap()) {
            *outcomes.entry(outcome).or_insert(0) += 1;
        }
        server.wait_for(|now| now == [0.0, 0.0]);
        outcomes
    };
    let mut all = round(1, REQUESTS / 2);
    let before = resident();
    round(2, REQUESTS / 2).into_iter().for_each(|(outcome, count)| *all.entry(outcome).or_insert(0) += count);
    let after = resident();
    println!("{all:?}; resident {before} -> {after} bytes");
    let count = |status: u16, code: &str| all.get(&(status, code.to_owned())).copied().unwrap_or(0);
    let known = [
        (200, ""),
        (0, ""),
        (429, "queue_full"),
        // Answers that outgrow all that there is, whole and as streams.
        (507, "kv_memory_full"),
        (200, "kv_memory_full"),
        (400, "kv_budget_unsatisfiable"),
        (400, "context_length_exceeded"),
    ];
    let expected: usize = known.iter().map(|(status, code)| count(*status, code)).sum();
    assert_eq!(expected, REQUESTS, "{all:?}");
    for (status, code) in [(200, ""), (0, ""), (400, "kv_budget_unsatisfiable")] {
        assert!(count(status, code) > 50, "{status} {code}: {all:?}");
    }
    let metrics = server.get("/metrics").body;
    let part = |part: &str| {
        sample(&metrics, &format!("mosaickv_kv_bytes{{model_name=\"model\",part=\"{part}\"}}")).unwrap()
    };
    // Nothing is left but prompts that were read, which make room for others.
    assert_eq!(part("reserved"), part("prefixes"));
    assert_eq!(sample(&metrics, "vllm:kv_cache_usage_perc"), Some(0.0));
    assert!(part("reserved") <= kv_memory as f64);
    assert!(after < before + (16 << 20), "{before} -> {after} bytes in memory after as many requests again");
}
