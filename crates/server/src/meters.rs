//! What has been asked and answered, in numbers for Prometheus? Under vLLM's names, which dashboards and gateways know, and ours.

use crate::job::Timeline;
use crate::reply::Finish;
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use mosaickv_engine::{Bill, Figures};
use mosaickv_kv::KvFormat;
use std::time::Duration;

/// Upper bounds of the buckets of times to the first token, of queues, prefills and whole answers, in seconds.
const LONG: [f64; 20] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0,
];

/// Of times between tokens.
const SHORT: [f64; 18] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 20.0,
];

const KV_BYTES: &str = "mosaickv_kv_bytes";

const TOKENS_APART: &str = "vllm:inter_token_latency_seconds";

/// All of them.
pub struct Meters {
    make: Maker,
    handle: PrometheusHandle,
    first_token: Histogram,
    between_tokens: Histogram,
    whole: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    compress: Histogram,
    success: [(Finish, Counter); 3],
    sampled: SampledMeters,
}

/// What is read off the engine when somebody asks.
struct SampledMeters {
    running: Gauge,
    waiting: Gauge,
    usage: Gauge,
    bytes: [Gauge; 3],
    exact_bytes: Gauge,
    read_bytes: Counter,
    prompt_tokens: Counter,
    output_tokens: Counter,
    preemptions: Counter,
    harder: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
}

/// Makes meters with the label that all of them have.
struct Maker {
    recorder: PrometheusRecorder,
    model: String,
}

const METADATA: Metadata<'static> = Metadata::new("mosaickv", Level::INFO, None);

impl Maker {
    fn key(&self, name: &'static str, more: &[(&'static str, &str)]) -> Key {
        let mut labels = vec![Label::new("model_name", self.model.clone())];
        labels.extend(more.iter().map(|(name, value)| Label::new(*name, (*value).to_owned())));
        Key::from_parts(name, labels)
    }

    fn histogram(&self, name: &'static str, what: &'static str) -> Histogram {
        self.recorder.describe_histogram(KeyName::from(name), Some(Unit::Seconds), what.into());
        self.recorder.register_histogram(&self.key(name, &[]), &METADATA)
    }

    fn counter(&self, name: &'static str, what: &'static str) -> Counter {
        self.recorder.describe_counter(KeyName::from(name), None, what.into());
        self.recorder.register_counter(&self.key(name, &[]), &METADATA)
    }

    fn gauge(&self, name: &'static str, what: &'static str) -> Gauge {
        self.recorder.describe_gauge(KeyName::from(name), None, what.into());
        self.recorder.register_gauge(&self.key(name, &[]), &METADATA)
    }

    fn success(&self, finish: Finish) -> (Finish, Counter) {
        let name = "vllm:request_success_total";
        self.recorder.describe_counter(KeyName::from(name), None, "Answers that were completed.".into());
        let key = self.key(name, &[("finished_reason", finish.name())]);
        (finish, self.recorder.register_counter(&key, &METADATA))
    }

    fn bytes(&self, part: &'static str) -> Gauge {
        self.labelled(KV_BYTES, "Bytes for keys and values.", &[("part", part)])
    }

    fn labelled(&self, name: &'static str, what: &'static str, labels: &[(&'static str, &str)]) -> Gauge {
        self.recorder.describe_gauge(KeyName::from(name), None, what.into());
        self.recorder.register_gauge(&self.key(name, labels), &METADATA)
    }

    /// Bytes by formats, what became of prompts, and what answers had of their exact caches: of what there is.
    fn by_format(&self, figures: &Figures) {
        for name in KvFormat::names() {
            let bytes = figures.kv_by_format.get(name).copied().unwrap_or(0);
            let labels = [("part", "allocated"), ("format", name)];
            self.labelled(KV_BYTES, "Bytes for keys and values.", &labels).set(bytes as f64);
        }
        let counter_of = |name, what: &'static str, labels: &[(&'static str, &str)]| {
            self.recorder.describe_counter(KeyName::from_const_str(name), None, what.into());
            self.recorder.register_counter(&self.key(name, labels), &METADATA)
        };
        for (strategy, count) in &figures.strategies {
            let what = "Segments (packed) and pages (layered) that prompts were compressed into.";
            counter_of("mosaickv_kv_segments_total", what, &[("strategy", strategy)]).absolute(*count);
        }
        for (kv, shadowed) in &figures.shadowed {
            let format = kv.to_string();
            let labels = [("format", &*format)];
            let counter = |name, what| counter_of(name, what, &labels);
            counter(
                "mosaickv_shadow_steps_total",
                "Sampled tokens that were held against their exact caches.",
            )
            .absolute(shadowed.steps);
            counter("mosaickv_shadow_agreed_total", "Those whose most probable token is the exact cache's.")
                .absolute(shadowed.agreed);
            let what = "KL divergences of these from the exact caches' distributions, summed up, in nats.";
            self.labelled("mosaickv_shadow_kl_sum", what, &labels).set(shadowed.kl);
        }
    }

    fn sampled(&self) -> SampledMeters {
        SampledMeters {
            running: self.gauge("vllm:num_requests_running", "Requests with a cache."),
            waiting: self.gauge("vllm:num_requests_waiting", "Requests that wait for theirs."),
            usage: self.gauge(
                "vllm:kv_cache_usage_perc",
                "Share of the bytes for keys and values that is reserved for what nobody may drop.",
            ),
            bytes: ["reserved", "budget", "prefixes"].map(|part| self.bytes(part)),
            exact_bytes: self.gauge(
                "mosaickv_kv_bytes_exact_equivalent",
                "Bytes that the tokens of all caches would take as f16.",
            ),
            read_bytes: self.counter(
                "mosaickv_kv_bytes_read_total",
                "Bytes of keys and values that attention read (a GPU counts none).",
            ),
            prompt_tokens: self.counter("vllm:prompt_tokens_total", "Prompt tokens read."),
            output_tokens: self.counter("vllm:generation_tokens_total", "Tokens sampled."),
            prefix_queries: self
                .counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
            prefix_hits: self
                .counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache."),
            harder: self.counter(
                "mosaickv_compressed_harder_total",
                "Requests whose keys and values were compressed harder to make room.",
            ),
            preemptions: self
                .counter("vllm:num_preemptions_total", "Requests that lost their caches and read again."),
        }
    }
}

impl Meters {
    /// Of a server of the model of this name.
    pub fn new(model: &str) -> Meters {
        let builder = PrometheusBuilder::new().set_buckets(&LONG).expect("there are bounds");
        let short = Matcher::Full(TOKENS_APART.to_owned());
        let recorder =
            builder.set_buckets_for_metric(short, &SHORT).expect("there are bounds").build_recorder();
        let handle = recorder.handle();
        let make = Maker { recorder, model: model.to_owned() };
        Meters {
            first_token: make
                .histogram("vllm:time_to_first_token_seconds", "From the request to the first token."),
            between_tokens: make.histogram(TOKENS_APART, "From a token to the next."),
            whole: make.histogram("vllm:e2e_request_latency_seconds", "From the request to the last token."),
            queue: make.histogram("vllm:request_queue_time_seconds", "Until a request was first scheduled."),
            prefill: make.histogram("vllm:request_prefill_time_seconds", "From then until the first token."),
            decode: make.histogram("vllm:request_decode_time_seconds", "From the first token to the last."),
            compress: make
                .histogram("mosaickv_compress_seconds", "Of compressing a prompt's keys and values."),
            success: [Finish::Stop, Finish::Length, Finish::ToolCalls].map(|finish| make.success(finish)),
            sampled: make.sampled(),
            handle,
            make,
        }
    }

    /// A token was sampled: the first so long after the request came, another so long after the one before.
    pub fn token(&self, timeline: &Timeline, since: Duration) {
        match timeline.is_first() {
            true => self.first_token.record(since),
            false => self.between_tokens.record(since),
        }
    }

    /// An answer is complete.
    pub fn finished(&self, finish: Finish, bill: &Bill, whole: Duration) {
        self.whole.record(whole);
        self.queue.record(bill.queued);
        self.prefill.record(bill.prefill);
        self.decode.record(bill.decode);
        if bill.compress > Duration::ZERO {
            self.compress.record(bill.compress);
        }
        for (_, counter) in self.success.iter().filter(|(of, _)| *of == finish) {
            counter.increment(1);
        }
    }

    /// The text that Prometheus reads, with what the engine does now.
    pub fn render(&self, figures: Option<Figures>) -> String {
        let (meters, figures) = (&self.sampled, figures.unwrap_or_default());
        meters.running.set(figures.running as f64);
        meters.waiting.set(figures.waiting as f64);
        let needed = figures.kv_reserved - figures.kv_droppable;
        meters.usage.set(needed as f64 / figures.kv_budget.max(1) as f64);
        let bytes = [figures.kv_reserved, figures.kv_budget, figures.kv_prefixes];
        for (gauge, bytes) in meters.bytes.iter().zip(bytes) {
            gauge.set(bytes as f64);
        }
        self.make.by_format(&figures);
        meters.exact_bytes.set(figures.kv_exact as f64);
        meters.read_bytes.absolute(figures.kv_read);
        meters.prompt_tokens.absolute(figures.prompt_tokens);
        meters.output_tokens.absolute(figures.output_tokens);
        meters.preemptions.absolute(figures.preemptions);
        meters.harder.absolute(figures.harder);
        meters.prefix_queries.absolute(figures.prefix_queries);
        meters.prefix_hits.absolute(figures.prefix_hits);
        self.handle.render()
    }

    /// Sorts what was recorded into buckets; to be called now and then where nobody asks.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}
