//! Passes on an emulated GPU against those of the CPU, on random models of several families.

use half::bf16;
use mosaickv_kernels::Pool;
use mosaickv_kernels::cuda::Gpu;
use mosaickv_kernels::cuda::emulated;
use mosaickv_kernels::matrix::Precision;
use mosaickv_kv::{Background, KvCache, KvFormat, Layered, Timing};
use mosaickv_model::calibrate::calibrate;
use mosaickv_model::{Model, Part, Sequence, Share, Wanted, greedy, read_each, step_each};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// The tiny checkpoint of a family with heads of 64 channels and random weights, and tokens to read.
fn load(family: &str) -> Model {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(family);
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(name), folder.path().join(name)).unwrap();
    }
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    config["head_dim"] = json!(64);
    config["max_position_embeddings"] = json!(8192);
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let files = from.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|end| end == "safetensors"));
    let mut tensors = vec![];
    for bytes in files.map(|path| std::fs::read(path).unwrap()) {
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let mut shape = tensor.shape().to_vec();
            match &name {
                name if name.contains("o_proj") => shape[1] *= 4,
                name if ["q_", "k_", "v_"].iter().any(|part| name.contains(part)) => shape[0] *= 4,
                _ => {}
            }
            tensors.push((name.to_owned(), shape));
        }
    }
    tensors.sort();
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape)| (name.clone(), shape.clone(), numbers(&name, &shape)))
        .collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    Model::load(folder.path(), &mut |_, _| ()).unwrap().0
}

/// Random numbers in bf16: norms about 1, matrices that keep lengths.
fn numbers(name: &str, shape: &[usize]) -> Vec<u8> {
    let mut x = name.bytes().fold(7u64, |x, byte| x.wrapping_mul(31).wrapping_add(u64::from(byte))) | 1;
    let mut normal = || {
        let mut sum = 0.0;
        for _ in 0..6 {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            sum += (x >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        }
        sum * 1.414
    };
    let (mean, spread) = match shape {
        [_] if name.contains("norm") => (1.0, 0.1),
        [_] => (0.0, 0.3),
        [_, cols] if name.contains("embed") || name.contains("head") => (0.0, (*cols as f32).sqrt().recip()),
        [_, cols] => (0.0, (*cols as f32).sqrt().recip()),
        _ => unreachable!("{shape:?}"),
    };
    let count = shape.iter().product();
    (0..count).flat_map(|_| bf16::from_f32(mean + spread * normal()).to_le_bytes()).collect()
}

fn on_device(family: &str, gpu: &Gpu) -> Model {
    let mut model = load(family);
    model.to_device(gpu).unwrap();
    model
}

fn tokens(count: usize, seed: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i * 31 + i * 17 + seed * 101) % 280 + 3) as u32).collect()
}

/// Activations are rounded to bf16 before each product, by 0.11 % in root mean square: with 4 products a layer and the last one logits are off by
/// 0.3 to 0.4 % of the largest, which is about three times their mean. The farthest of 20,000 lies about five times that off.
const ERROR: f32 = 0.02;

fn close(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("{what}: off by {:.2e} of the largest logit", worst / largest);
    assert!(worst <= ERROR * largest, "{what}: off by {worst}, largest {largest}");
}

fn sequence<'a>(model: &'a Model, pool: &'a Pool, format: KvFormat) -> Sequence<'a> {
    Sequence::new(model, pool, format).unwrap().with_precision(Precision::Full)
}

#[test]
fn prompts_and_steps_of_each_family_are_the_cpu_s() {
    let Some(gpu) = emulated(4) else { return };
    let pool = Pool::new(2);
    for family in ["llama", "qwen2", "qwen3", "smollm3"] {
        let (cpu, device) = (load(family), on_device(family, &gpu));
        let mut want = sequence(&cpu, &pool, KvFormat::Exact);
        let mut got = sequence(&device, &pool, KvFormat::Exact);
        let prompt = tokens(130, 1);
        let (a, b) = (got.prefill(&prompt, &mut |_, _| ()), want.prefill(&prompt, &mut |_, _| ()));
        close(&a.unwrap(), &b.unwrap(), &format!("{family}, prompt"));
        for (i, token) in tokens(4, 2).into_iter().enumerate() {
            close(&got.step(token).unwrap(), &want.step(token).unwrap(), &format!("{family}, step {i}"));
        }
        assert_eq!(got.cache().tokens(), 134);
        assert_eq!(got.cache().bytes(), want.cache().bytes());
        got.cache().check().unwrap();
        // All logits of a chunk, and of steps that are known.
        let mut rows = vec![vec![]; 2];
        for (sequence, rows) in [&mut got, &mut want].into_iter().zip(&mut rows) {
            sequence.score(&tokens(5, 3), &mut |_, logits| rows.push(logits.to_vec())).unwrap();
            let share = Share { sequence, tokens: &tokens(3, 4), part: Part::Step, wanted: Wanted::All };
            read_each(&mut [share], &mut |_, _, logits| rows.push(logits.to_vec())).unwrap();
        }
        assert_eq!(rows[0].len(), 8);
        for (i, (got, want)) in rows[0].iter().zip(&rows[1]).enumerate() {
            close(got, want, &format!("{family}, token {i} of a chunk"));
        }
    }
}

#[test]
fn what_a_sequence_gets_does_not_depend_on_the_others() {
    let Some(gpu) = emulated(3) else { return };
    let pool = Pool::new(2);
    let device = on_device("llama", &gpu);
    let read = |i: usize| {
        let mut sequence = sequence(&device, &pool, KvFormat::Exact);
        sequence.prefill(&tokens([1, 70, 129][i], i), &mut |_, _| ()).unwrap();
        sequence
    };
    let mut together: Vec<Sequence> = (0..3).map(read).collect();
    let mut alone: Vec<Sequence> = (0..3).map(read).collect();
    for t in 0..3 {
        let next: Vec<u32> = (0..3).map(|i| tokens(9, i)[t]).collect();
        let all = step_each(&mut together.iter_mut().collect::<Vec<_>>(), &next).unwrap();
        for ((sequence, token), got) in alone.iter_mut().zip(&next).zip(all.chunks(all.len() / 3)) {
            assert_eq!(sequence.step(*token).unwrap(), got);
        }
    }
    // Steps and a prompt in one pass, one of a clone.
    let (mut clone, mut new) = (together[1].clone(), sequence(&device, &pool, KvFormat::Exact));
    let (mut rows, prompt) = (vec![], tokens(66, 7));
    let shares = [(&mut clone, &[5u32][..], Part::Step), (&mut new, &prompt[..], Part::PromptEnd)];
    let shares =
        shares.map(|(sequence, tokens, part)| Share { sequence, tokens, part, wanted: Wanted::Last });
    read_each(&mut { shares }, &mut |share, t, logits| rows.push((share, t, logits.to_vec()))).unwrap();
    let mut other = sequence(&device, &pool, KvFormat::Exact);
    assert_eq!(rows[0], (0, 0, alone[1].step(5).unwrap()));
    assert_eq!(rows[1], (1, 65, other.prefill(&prompt, &mut |_, _| ()).unwrap()));
    drop((together, alone, clone, new, other));
    assert_eq!(device.device.as_ref().unwrap().bytes().exact, 0, "pages that nobody gave back");
}

/// Steps are one graph as long as the memory is the same: through pages that are begun, until there are more than there was room for, and again
/// with another number of sequences.
#[test]
fn steps_are_a_graph_until_what_they_use_changes() {
    let Some(gpu) = emulated(2) else { return };
    let pool = Pool::new(2);
    let (cpu, on_gpu) = (load("llama"), on_device("llama", &gpu));
    let device = on_gpu.device.as_ref().unwrap();
    // Room for what the first sequence needs at first.
    device.reserve(3).unwrap();
    let mut want: Vec<Sequence> = (0..2).map(|_| sequence(&cpu, &pool, KvFormat::Exact)).collect();
    let mut got: Vec<Sequence> = (0..2).map(|_| sequence(&on_gpu, &pool, KvFormat::Exact)).collect();
    let prompts = [tokens(61, 1), tokens(9, 2)];
    for (prompt, (got, want)) in prompts.iter().zip(got.iter_mut().zip(&mut want)) {
        got.prefill(prompt, &mut |_, _| ()).unwrap();
        want.prefill(prompt, &mut |_, _| ()).unwrap();
    }
    let mut graphs = vec![];
    for (i, token) in tokens(70, 3).into_iter().enumerate() {
        let what = format!("step {i}");
        close(&got[0].step(token).unwrap(), &want[0].step(token).unwrap(), &what);
        graphs.push(device.graphs());
    }
    assert_eq!((graphs[0], graphs[1], graphs[65]), (0, 1, 1), "{graphs:?}");
    assert_eq!(graphs[69], 2, "{graphs:?}: a third page took other memory");
    for i in 0..3 {
        let next = [5 + i, 50 + i];
        let each = |sequences: &mut Vec<Sequence>| {
            step_each(&mut sequences.iter_mut().collect::<Vec<_>>(), &next).unwrap()
        };
        close(&each(&mut got), &each(&mut want), &format!("two sequences, step {i}"));
        assert_eq!(device.graphs(), [0, 1, 1][i as usize]);
    }
}

/// A calibrated model on the CPU, and the same on the device.
fn calibrated(gpu: &Gpu, pool: &Pool) -> [Model; 2] {
    let (mut cpu, mut device) = (load("llama"), load("llama"));
    let calibration = Arc::new(calibrate(&cpu, pool, &[tokens(1000, 9)], &mut |_, _| ()).unwrap());
    cpu.calibration = Some(calibration.clone());
    device.calibration = Some(calibration);
    device.to_device(gpu).unwrap();
    [cpu, device]
}

/// A prompt that the CPU read goes on on the device, through sealed buffers; mirrors of longer answers have tests of their own.
#[test]
fn a_compressed_cache_goes_on_as_on_the_cpu() {
    let Some(gpu) = emulated(4) else { return };
    let pool = Pool::new(2);
    let [cpu, device] = calibrated(&gpu, &pool);
    let format = KvFormat::Layered(Layered::default());
    let mut want = sequence(&cpu, &pool, format);
    let mut next = greedy(&want.prefill(&tokens(2100, 1), &mut |_, _| ()).unwrap());
    let background = Arc::new(Background::new(1, 1 << 20));
    let mut got = Sequence::with_cache(&device, &pool, want.cache().clone()).unwrap();
    got = got.with_background(background, Timing::Fixed);
    for i in 0..40 {
        let (a, b) = (got.step(next).unwrap(), want.step(next).unwrap());
        close(&a, &b, &format!("step {i}"));
        next = greedy(&b);
    }
    // What changes from step to step is no part of it.
    assert_eq!(device.device.as_ref().unwrap().graphs(), 1);
    got.cache().check().unwrap();
    let bytes = |sequence: &Sequence| sequence.cache().bytes().packed as f64;
    assert!((bytes(&got) / bytes(&want) - 1.0).abs() < 0.02, "{} and {}", bytes(&got), bytes(&want));
}

/// A prompt whose last tokens the device reads is encoded there, to the bit as the host would.
#[test]
fn a_prompt_that_ends_on_the_device_is_encoded_there() {
    let Some(gpu) = emulated(4) else { return };
    let pool = Pool::new(2);
    let [cpu, device] = calibrated(&gpu, &pool);
    let prompt = tokens(2103, 1);
    let mut before = sequence(&cpu, &pool, KvFormat::Layered(Layered::default()));
    let share =
        Share { sequence: &mut before, tokens: &prompt[..2100], part: Part::Prompt, wanted: Wanted::Nothing };
    read_each(&mut [share], &mut |_, _, _| ()).unwrap();
    let mut got = Sequence::with_cache(&device, &pool, before.cache().clone()).unwrap();
    let share =
        Share { sequence: &mut got, tokens: &prompt[2100..], part: Part::PromptEnd, wanted: Wanted::Last };
    read_each(&mut [share], &mut |_, _, _| ()).unwrap();
    let mut want = got.cache().clone();
    want.finish_prompt(&pool);
    let used = || device.device.as_ref().unwrap().used();
    let exact = used();
    assert!(got.begin_finish_prompt());
    got.finish_prompt();
    assert!(used() > exact, "nothing was encoded on the device");
    let saved = |cache: &KvCache| {
        let mut out = vec![];
        cache.write(&mut out).unwrap();
        out
    };
    assert!(got.cache().is_compressed() && saved(got.cache()) == saved(&want));
    got.step(5).unwrap();
}

/// A prompt that the device read goes on there, through encoded buffers and strategies that are swapped in. Each step is held against the
/// CPU's from the same cache: of keys that differ in their last bits other elements are kept.
#[test]
fn packed_caches_are_read_as_on_the_cpu() {
    let Some(gpu) = emulated(4) else { return };
    let pool = Pool::new(2);
    let (cpu, device) = (load("llama"), on_device("llama", &gpu));
    for (format, prompt, swaps) in [
        ("packed:selected=1,close=2", 200, true),
        ("packed:kept=0.5,group=1,block=4,selected=1,rotation=none", 328, false),
    ] {
        let format: KvFormat = format.parse().unwrap();
        let background = Arc::new(Background::new(1, 1 << 24));
        let mut got = sequence(&device, &pool, format).with_background(background, Timing::Fixed);
        let prompt = tokens(prompt, 1);
        let logits = got.prefill(&prompt, &mut |_, _| ()).unwrap();
        let of_cpu = sequence(&cpu, &pool, KvFormat::Exact).prefill(&prompt, &mut |_, _| ()).unwrap();
        close(&logits, &of_cpu, &format!("{format}, prompt"));
        let mut next = greedy(&logits);
        for i in 0..140 {
            let clone = Sequence::with_cache(&cpu, &pool, got.cache().clone()).unwrap();
            let a = got.step(next).unwrap();
            // A clone may pack its buffer with another segment's strategy.
            if i % 32 != 28 {
                let b = clone.with_precision(Precision::Full).step(next).unwrap();
                close(&a, &b, &format!("{format}, step {i}"));
            }
            next = greedy(&a);
        }
        got.cache().check().unwrap();
        assert_eq!(got.cache().swaps().swapped > 0, swaps, "{format}: {:?}", got.cache().swaps());
    }
}

/// Formats take steps of their own.
#[test]
fn sequences_of_all_formats_share_a_pass() {
    let Some(gpu) = emulated(3) else { return };
    let pool = Pool::new(2);
    let device = on_device("llama", &gpu);
    let formats = ["exact", "packed:selected=0.5", "packed:selected=0.5,block=4", "packed"];
    let read = |format: &str| {
        let mut sequence = sequence(&device, &pool, format.parse().unwrap());
        sequence.prefill(&tokens(150, 5), &mut |_, _| ()).unwrap();
        sequence
    };
    let (mut together, mut alone) = (formats.map(read), formats.map(read));
    for t in 0..3 {
        let all = step_each(&mut together.iter_mut().collect::<Vec<_>>(), &[7 + t; 4]).unwrap();
        for (sequence, got) in alone.iter_mut().zip(all.chunks(all.len() / 4)) {
            assert_eq!(sequence.step(7 + t).unwrap(), got);
        }
    }
}

#[test]
fn what_a_gpu_is_not_for_is_said() {
    let Some(gpu) = emulated(1) else { return };
    let pool = Pool::new(1);
    let refused = |family: &str| load(family).to_device(&gpu).unwrap_err().to_string();
    assert!(refused("gemma3").contains("a sliding window"), "{}", refused("gemma3"));
    let device = on_device("llama", &gpu);
    let error = Sequence::new(&device, &pool, "q8_0".parse().unwrap()).err().unwrap().to_string();
    assert!(error.contains("--kv is q8_0") && error.contains("--device cpu"), "{error}");
    // A budget that has room for the weights, and for little else.
    let mut small = load("llama");
    let budget = gpu.with_budget(1_100_000);
    small.to_device(&budget).unwrap();
    let mut sequence = sequence(&small, &pool, KvFormat::Exact);
    let error = sequence.prefill(&tokens(4000, 1), &mut |_, _| ()).unwrap_err().to_string();
    assert!(error.contains("budget"), "{error}");
}
