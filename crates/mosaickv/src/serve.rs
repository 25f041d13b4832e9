//! `mosaickv serve`: which model is served where, to whom, and within which bytes?
//!
//! The socket is there before the model: while it loads, /health says so.

use crate::device::{DeviceArgs, ensure_room};
use crate::prefill::PrefillKv;
use crate::{ThreadArgs, calibrate, fetch};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use mosaickv_engine::{PrefixCache, Settings};
use mosaickv_kv::{ByteCount, KvFormat, Layered, Target};
use mosaickv_model::{Model, Text};
use mosaickv_server::{App, Metrics, Options, UnknownFields, serve as serve_connections};
use std::ffi::OsString;
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Threads for connections, tokenizing and text; the model has its own.
const CONNECTION_THREADS: usize = 2;

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    mosaickv serve smollm2-135m\n  \
    mosaickv serve ./model.gguf --kv layered:8 --kv-memory 8GiB --max-num-seqs 32 --api-key-file keys.txt\n  \
    mosaickv serve ./model.gguf --device cuda --kv-memory 40GiB\n  \
    mosaickv serve --config server.toml\n  \
    mosaickv serve ./Qwen3-0.6B --host 0.0.0.0 --port 80 --api-key secret --allow-origin https://chat.example\n  \
    curl http://127.0.0.1:8000/v1/completions -d '{\"prompt\": \"Three rivers:\", \"kv\": {\"format\": \"layered:6\"}}'")]
pub struct ServeArgs {
    /// A TOML file with flags as keys, such as kv-memory = "8GiB"; flags and the environment go before it
    #[arg(long, env = "MOSAICKV_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// A GGUF file, a safetensors folder, smollm2-135m, gemma3-270m, or, built with --features hub, owner/name:file
    #[arg(env = "MOSAICKV_MODEL")]
    model: String,
    /// Address to listen at; others than this machine reach it only if it is not the loopback address
    #[arg(long, env = "MOSAICKV_HOST", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen at; 0 for any that is free
    #[arg(long, env = "MOSAICKV_PORT", default_value_t = 8000)]
    port: u16,
    /// How keys and values are kept where a request does not say: as after `mosaickv run --kv`
    #[arg(long, env = "MOSAICKV_KV", default_value = "layered", value_name = "FORMAT")]
    kv: KvFormat,
    /// Bytes that the keys and values of all requests may take together: 4GiB, 900MB
    #[arg(long, env = "MOSAICKV_KV_MEMORY", default_value = "4GiB", value_name = "BYTES")]
    kv_memory: ByteCount,
    /// To what ratio requests in the layered format that run may be compressed once more when bytes run out, before others have to
    /// wait or to begin again [default: they are not]
    #[arg(long, env = "MOSAICKV_KV_FLOOR", value_name = "RATIO", value_parser = ratio)]
    kv_floor: Option<f32>,
    /// Hold at most this share of all answers, such as 0.01, against their exact caches for 32 tokens, where there are bytes for both; what comes
    /// of it is in /metrics as mosaickv_shadow_*
    #[arg(long, env = "MOSAICKV_SHADOW", default_value = "0", value_name = "SHARE", value_parser = share)]
    shadow: f64,
    /// Remember which tokens are in which pages of the layered format, so that the page at / can show their texts (not of what is
    /// read from files): takes 4 bytes more for each token of each layer and KV head, beside what the format was asked to take
    #[arg(long, env = "MOSAICKV_REMEMBER_PLACES")]
    remember_places: bool,
    /// What later tokens of a long prompt attend to: exact reads all of it before it is compressed, compressed:4096 its first 4,096
    /// tokens, and the rest through what is compressed, in a fraction of the bytes
    #[arg(long, env = "MOSAICKV_PREFILL_KV", default_value = "exact", value_name = "WHAT")]
    prefill_kv: PrefillKv,
    /// Most tokens of prompt and answer [default: the model's context]
    #[arg(
        long,
        short = 'c',
        visible_alias = "ctx-size",
        env = "MOSAICKV_MAX_MODEL_LEN",
        value_name = "TOKENS"
    )]
    max_model_len: Option<u32>,
    /// Requests that are answered at a time (also -np)
    #[arg(
        long,
        visible_alias = "parallel",
        env = "MOSAICKV_MAX_NUM_SEQS",
        default_value_t = 64,
        value_name = "REQUESTS"
    )]
    max_num_seqs: u32,
    /// Tokens that a pass through the model reads, about
    #[arg(long, env = "MOSAICKV_MAX_NUM_BATCHED_TOKENS", default_value_t = 512, value_name = "TOKENS")]
    max_num_batched_tokens: u32,
    /// Requests that wait at a time; further ones get 429
    #[arg(long, env = "MOSAICKV_MAX_WAITING", default_value_t = 512, value_name = "REQUESTS")]
    max_waiting: u32,
    /// Forget prompts when their answers are complete, instead of keeping them for requests that begin with the same tokens
    #[arg(long, env = "MOSAICKV_NO_PREFIX_CACHE")]
    no_prefix_cache: bool,
    /// Names of the model in requests; answers carry the first [default: the model's own]
    #[arg(long, short = 'a', visible_alias = "alias", env = "MOSAICKV_SERVED_MODEL_NAME", value_name = "NAME", value_delimiter = ',', num_args = 1..)]
    served_model_name: Vec<String>,
    /// What `mosaickv calibrate` wrote, for the layered format [default: learnt once from texts in this program]
    #[arg(long, value_name = "FILE", env = "MOSAICKV_CALIBRATION")]
    calibration: Option<PathBuf>,
    /// The folder for contexts that are saved, which is made if it is not there [default: contexts are in memory alone]
    #[arg(long, visible_alias = "slot-save-path", env = "MOSAICKV_CONTEXTS", value_name = "FOLDER")]
    contexts: Option<PathBuf>,
    #[command(flatten)]
    threads: ThreadArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    clients: ClientArgs,
}

/// Who may ask, and for how long.
#[derive(Args)]
struct ClientArgs {
    /// A key that requests must have; may be given several times [default: none need one]
    #[arg(long, env = "MOSAICKV_API_KEY", hide_env_values = true, value_name = "KEY", value_delimiter = ',')]
    api_key: Vec<String>,
    /// A file with a key on each line
    #[arg(long, env = "MOSAICKV_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Let anybody read /metrics
    #[arg(long, env = "MOSAICKV_OPEN_METRICS")]
    open_metrics: bool,
    /// Refuse requests with fields that are not known, instead of naming them in the answer's x-ignored-params
    #[arg(long, env = "MOSAICKV_STRICT_PARAMS")]
    strict_params: bool,
    /// The largest body that is read
    #[arg(long, env = "MOSAICKV_BODY_LIMIT", default_value = "32MiB", value_name = "BYTES")]
    body_limit: ByteCount,
    /// Seconds in which a request's headers must have come, and each piece of its body
    #[arg(long, env = "MOSAICKV_READ_TIMEOUT", default_value = "30", value_name = "SECONDS", value_parser = seconds)]
    read_timeout: Duration,
    /// Seconds after which an answer is given up [default: none]
    #[arg(long, env = "MOSAICKV_REQUEST_TIMEOUT", value_name = "SECONDS", value_parser = seconds)]
    request_timeout: Option<Duration>,
    /// Seconds that running requests have to end after SIGTERM or Ctrl-C; a second one ends them at once
    #[arg(long, env = "MOSAICKV_SHUTDOWN_TIMEOUT", default_value = "30", value_name = "SECONDS", value_parser = seconds)]
    shutdown_timeout: Duration,
    /// An origin whose web pages may ask, or *; may be given several times [default: none]
    #[arg(long, env = "MOSAICKV_ALLOW_ORIGIN", value_name = "ORIGIN", value_delimiter = ',')]
    allow_origin: Vec<String>,
}

/// A time such as 30 or 0.5.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text} is no number of seconds"))?;
    Duration::try_from_secs_f64(number).map_err(|error| error.to_string())
}

/// A share such as 0.01.
fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err(format!("{text} is no share; wanted 0 to 1, such as 0.01")),
    }
}

/// A ratio such as 16.
fn ratio(text: &str) -> Result<f32, String> {
    match text.parse()? {
        Target::Ratio(ratio) => Ok(ratio),
        Target::Bytes(_) => Err(format!("{text} is a number of bytes; wanted a ratio such as 16")),
    }
}

/// llama-server's `-np`, which is two letters behind one dash, as a flag that can be read here.
pub fn long_flag(argument: OsString) -> OsString {
    if argument == "-np" { "--parallel".into() } else { argument }
}

/// `mosaickv serve`
pub fn serve(args: &ServeArgs) -> Result<()> {
    let settings = args.settings()?;
    let options = args.options()?;
    let path = fetch::resolve(&args.model)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONNECTION_THREADS)
        .enable_all()
        .build()
        .context("cannot start the threads for connections")?;
    let done = runtime.block_on(run(args, options, settings, path));
    // What still computes has nobody left to tell.
    runtime.shutdown_background();
    done
}

async fn run(args: &ServeArgs, options: Options, settings: Settings, path: PathBuf) -> Result<()> {
    let listener = TcpListener::bind((args.host, args.port))
        .await
        .with_context(|| format!("cannot listen at {}:{}; give another --port", args.host, args.port))?;
    let address = listener.local_addr()?;
    if !address.ip().is_loopback() && options.api_keys.is_empty() {
        tracing::warn!("anybody who reaches {address} may ask; --api-key lets only those with a key");
    }
    let ready = format!("serving {} at http://{address} (kv {})", options.names[0], args.kv);
    let app = App::new(options);
    let stops = signals()?;
    let loading = tokio::task::spawn_blocking({
        let (app, kv, threads) = (app.clone(), args.kv, args.threads.count());
        let (calibration, device, memory) = (args.calibration.clone(), args.device.clone(), args.kv_memory);
        move || -> Result<()> {
            let weights = calibrate::weights_name(&path)?;
            let (mut model, text) = load((&path, calibration.as_deref()), threads, kv)?;
            device.place(&mut model, &[kv])?;
            ensure_room(&model, memory)?;
            app.load((Arc::new(model), weights), text, threads, settings);
            Ok(())
        }
    });
    let serving = serve_connections(listener, app, stops);
    tokio::pin!(serving);
    tokio::select! {
        done = &mut serving => return Ok(done?),
        loaded = loading => loaded.context("loading the model panicked")??,
    }
    println!("{ready}");
    Ok(serving.await?)
}

/// A message for each SIGTERM and Ctrl-C.
fn signals() -> Result<mpsc::Receiver<()>> {
    // A fetch that is over would end the process.
    fetch::hand_over_signals();
    let (stop, stops) = mpsc::channel(2);
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind).context("cannot wait for signals")?;
        let stop = stop.clone();
        tokio::spawn(async move { while signals.recv().await.is_some() && stop.send(()).await.is_ok() {} });
    }
    Ok(stops)
}

/// The model, ready for `kv` and, because any request may ask for it, for the layered format.
fn load(files: (&Path, Option<&Path>), threads: usize, kv: KvFormat) -> Result<(Model, Text)> {
    let pool = mosaickv_kernels::Pool::new(threads);
    let layered = KvFormat::Layered(Layered::default());
    match calibrate::load_for(files, &pool, &[kv, layered]) {
        Err(error) if !matches!(kv, KvFormat::Layered(_)) => {
            let loaded = calibrate::load_for(files, &pool, &[kv])?;
            tracing::warn!("requests cannot ask for the layered format: {error:#}");
            Ok(loaded)
        }
        loaded => loaded,
    }
}

impl ServeArgs {
    fn settings(&self) -> Result<Settings> {
        let positive = |flag: &str, number: u32| {
            ensure!(number > 0, "{flag} is 0; wanted at least 1");
            Ok(number as usize)
        };
        Ok(Settings {
            kv_memory: self.kv_memory.0,
            most_sequences: positive("--max-num-seqs", self.max_num_seqs)?,
            tokens_per_step: positive("--max-num-batched-tokens", self.max_num_batched_tokens)?,
            most_waiting: positive("--max-waiting", self.max_waiting)?,
            floor: self.kv_floor,
            remember_places: self.remember_places,
            // At most the share: of 0.3 every fourth.
            shadow_every: NonZeroU64::new(self.shadow.recip().ceil() as u64).filter(|_| self.shadow > 0.0),
            prefix_cache: if self.no_prefix_cache { PrefixCache::Off } else { PrefixCache::On },
        })
    }

    fn options(&self) -> Result<Options> {
        let clients = &self.clients;
        let most_tokens = self.max_model_len.map(|tokens| tokens as usize);
        ensure!(most_tokens != Some(0), "--max-model-len is 0; wanted at least 1");
        if let Some(folder) = &self.contexts {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot make the folder {} for saved contexts", folder.display()))?;
        }
        Ok(Options {
            names: self.names()?,
            kv: self.kv,
            most_tokens,
            most_exact: self.prefill_kv.tokens(),
            api_keys: clients.keys()?,
            metrics: if clients.open_metrics { Metrics::Open } else { Metrics::Guarded },
            unknown_fields: match clients.strict_params {
                true => UnknownFields::Refused,
                false => UnknownFields::Ignored,
            },
            body_limit: clients.body_limit.0,
            read_timeout: clients.read_timeout,
            request_timeout: clients.request_timeout,
            shutdown_timeout: clients.shutdown_timeout,
            allow_origins: clients.allow_origin.clone(),
            contexts: self.contexts.clone(),
            ..Options::default()
        })
    }

    /// What the model may be called: what it was given as, and a file or folder without its path and ending too.
    fn names(&self) -> Result<Vec<String>> {
        if let Some(name) =
            self.served_model_name.iter().find(|name| name.trim().is_empty() || name.contains("@kv="))
        {
            bail!("--served-model-name {name:?}: a name is not empty and has no @kv= in it");
        }
        if !self.served_model_name.is_empty() {
            return Ok(self.served_model_name.clone());
        }
        let path = Path::new(&self.model);
        let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
        let short = name.map(|name| name.to_string_lossy().into_owned()).filter(|_| path.exists());
        let mut names: Vec<String> = short.into_iter().chain([self.model.clone()]).collect();
        names.dedup();
        Ok(names)
    }
}

impl ClientArgs {
    fn keys(&self) -> Result<Vec<String>> {
        let mut keys = self.api_key.clone();
        if let Some(path) = &self.api_key_file {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the keys in {}", path.display()))?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            let before = keys.len();
            keys.extend(lines.map(str::to_owned));
            ensure!(keys.len() > before, "there is no key in {}; write one on a line", path.display());
        }
        ensure!(
            !keys.iter().any(|key| key.trim().is_empty()),
            "an API key is empty; leave it out or give one"
        );
        Ok(keys)
    }
}
