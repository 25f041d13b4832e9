//! Does the report say what the rows say, whatever they are?

use mosaickv_eval::report::{Report, table};
use mosaickv_eval::results::{AnswerRow, Cost, KlRow, Row, Settings};
use std::time::Instant;

fn cost(ratio: f64) -> Cost {
    Cost {
        prompt_tokens: 4000,
        kv_bytes: 1000,
        ratio,
        end_ratio: Some(0.9 * ratio),
        bits_per_scalar: 16.0 / ratio,
        bytes_read_per_step: Some(2.5e6 / ratio),
    }
}

fn answer(task: &str, length: usize, sample: usize, kv: (&str, f64), score: f64) -> AnswerRow {
    AnswerRow {
        task: task.into(),
        length,
        sample,
        kv: kv.0.into(),
        cost: cost(kv.1),
        depth: None,
        prediction: "p".into(),
        answers: vec!["a".into()],
        score,
    }
}

fn kl(text: &str, kv: (&str, f64), tokens: usize, kl: f64) -> KlRow {
    KlRow {
        text: text.into(),
        kv: kv.0.into(),
        layer: None,
        cost: cost(kv.1),
        tokens,
        kl,
        top1: 1.0 - kl,
        nll: 2.0 + kl,
        dnll: kl,
        perplexity: (2.0 + kl).exp(),
        depth: None,
    }
}

fn settings(suite: &str) -> Settings {
    Settings {
        suite: suite.into(),
        model: "tiny".into(),
        kv: vec!["exact".into(), "packed".into()],
        options: [("command", "mosaickv eval ruler"), ("seed", "7")]
            .map(|(name, value)| (name.into(), value.into()))
            .into(),
    }
}

/// 0 to 1, as good as random.
fn hash(numbers: [usize; 4]) -> f64 {
    let mut hash = 0x9e37_79b9_7f4a_7c15u64;
    for number in numbers {
        hash = (hash ^ number as u64).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash ^= hash >> 29;
    }
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

const METHODS: [(&str, f64); 9] = [
    ("exact", 0.98),
    ("packed", 3.1),
    ("packed:kept=0.375,group=2,block=16,selected=0.5", 2.2),
    ("packed:kept=0.125,group=4,block=8,selected=0.05", 5.8),
    ("kivi:bits=4,residual=128", 3.6),
    ("kivi:bits=2,residual=128", 6.9),
    ("snapkv:kept=0.5", 2.0),
    ("snapkv:kept=0.25", 4.0),
    ("snapkv:kept=0.125", 7.9),
];

/// As a RULER run leaves it.
fn ruler(samples: usize, lengths: &[usize]) -> Vec<Row> {
    let tasks = ["niah_single_1", "niah_multikey_2", "vt", "cwe"];
    let mut rows = vec![];
    for &length in lengths {
        for (t, task) in tasks.into_iter().enumerate() {
            for sample in 0..samples {
                for kv in METHODS {
                    let depth = hash([sample, length, t, 1]);
                    let chance = 1.05
                        - 0.03 * kv.1 * (length as f64 / 4096.0).ln_1p()
                        - 0.2 * depth * (kv.1 - 1.0) / 8.0;
                    let right = hash([sample, length, t, 2]) < chance && (task, length) != ("cwe", 16384);
                    let mut row = answer(task, length, sample, kv, f64::from(u8::from(right)));
                    row.depth = task.starts_with("niah").then_some(depth);
                    rows.push(Row::Answer(row));
                }
            }
        }
    }
    rows
}

/// As a KL run leaves it.
fn divergences() -> Vec<Row> {
    let mut rows = vec![];
    let texts = ["alice", "kernel source", "alice ask 1", "alice ask 2", "kernel source ask 1"];
    for (t, text) in texts.into_iter().enumerate() {
        for (m, kv) in METHODS.into_iter().enumerate() {
            let value = if m == 0 { 0.0 } else { 0.002 * (1.0 + t as f64) * (kv.1 - 1.0).powi(2) };
            rows.push(Row::Kl(kl(text, kv, 500, value)));
        }
    }
    for layer in 0..24 {
        for (m, kv) in METHODS.into_iter().enumerate().skip(1) {
            let value = 0.0005 * (1.0 + 9.0 * hash([layer, m, 0, 0])) * kv.1;
            rows.push(Row::Kl(KlRow { layer: Some(layer), ..kl("alice", kv, 500, value) }));
        }
    }
    rows
}

#[test]
fn a_small_run_reads_as_worked_out_by_hand() {
    let (exact, packed) = (("exact", 1.0), ("packed", 4.0));
    let mut rows = vec![];
    for sample in 0..4 {
        rows.push(Row::Answer(answer("a", 4096, sample, exact, 1.0)));
        rows.push(Row::Answer(answer("b_c", 4096, sample, exact, 0.5)));
        rows.push(Row::Answer(answer("none", 4096, sample, exact, 0.0)));
        // Differences 0, 0, -1, 0: a resample's sum is minus Binomial(4, 1/4), which is 4 with probability 0.004 and
        // at least 3 with 0.051, so the interval is -3/4 to 0.
        rows.push(Row::Answer(answer("a", 4096, sample, packed, if sample == 2 { 0.0 } else { 1.0 })));
        rows.push(Row::Answer(answer("none", 4096, sample, packed, 0.0)));
        if sample < 3 {
            rows.push(Row::Answer(answer("b_c", 4096, sample, packed, 0.5)));
        }
    }
    let markdown = Report::new(vec![(settings("ruler"), rows)]).markdown("plots/");
    let tables: Vec<&str> = markdown.lines().filter(|line| line.starts_with('|')).collect();
    // Over tasks: (75 + 50 + 0) / 3 beside (100 + 50 + 0) / 3; a third of the interval of the only task that varies.
    let wanted = "\
| setting | value |
| --- | --- |
| model | tiny |
| suite | ruler |
| KV formats | exact, packed |
| rows | 23 |
| seed | 7 |
| KV format | ratio | at the end | bits a scalar | MB read a step | samples | mean of 3 tasks | a | b_c | none |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| exact | 1.00 | 0.900 | 16.0 | 2.50 | 12 | 50.0 | 100.0 | 50.0 | 0.0 |
| packed | 4.00 | 3.60 | 4.00 | 0.625 | 11 of 12 | 41.7<br>-8.3 [-25.0, 0.0]<br>loss 16.7 % \
| 75.0<br>-25.0 [-75.0, 0.0]<br>loss 25.0 % | 50.0<br>0.0 [0.0, 0.0]<br>loss 0.0 %<br>3 of 4 samples \
| 0.0<br>0.0 [0.0, 0.0]<br>loss - |";
    assert_eq!(tables.join("\n"), wanted);
    assert!(markdown.contains("Exact itself scores 0 on none: the model cannot do this here"), "{markdown}");
    assert!(markdown.contains("```sh\nmosaickv eval ruler\n```"), "{markdown}");
    assert!(markdown.contains("](<plots/1-ruler-tiny-4096-ratio.svg>)"), "{markdown}");
}

#[test]
fn the_terminal_table_is_aligned_and_complete() {
    let rows: Vec<Row> = (0..3)
        .flat_map(|sample| {
            [
                Row::Answer(answer("a", 0, sample, ("exact", 1.0), 1.0)),
                Row::Answer(answer(
                    "a",
                    0,
                    sample,
                    ("packed:kept=0.25", 4.0),
                    f64::from(u8::from(sample > 0)),
                )),
                Row::Answer(answer("b", 0, sample, ("exact", 1.0), 0.25)),
            ]
        })
        .collect();
    let wanted = "\
At the length the data has

KV format           ratio  at the end  bits a scalar  MB read a step  score  to exact  95 % interval    loss  samples
1 exact              1.00       0.900           16.0            2.50   62.5         -              -       -        6
2 packed:kept=0.25   4.00        3.60           4.00           0.625   66.7     -33.3  [-100.0, 0.0]  33.3 %   3 of 6

score by task      1     2
a              100.0  66.7
b               25.0     -
";
    assert_eq!(table(&rows), wanted);
}

#[test]
fn kl_is_weighed_by_tokens_and_needles_are_apart() {
    let packed = ("packed", 4.0);
    let rows = vec![
        Row::Kl(kl("alice", packed, 100, 0.1)),
        Row::Kl(kl("code", packed, 300, 0.3)),
        Row::Kl(kl("alice ask 1", packed, 10, 0.5)),
        Row::Kl(kl("alice ask 2", packed, 30, 0.1)),
        Row::Kl(KlRow { layer: Some(3), ..kl("alice", packed, 100, 0.04) }),
        // The same again does not count twice.
        Row::Kl(kl("alice", packed, 100, 0.9)),
    ];
    let text = table(&rows);
    // (100 x 0.1 + 300 x 0.3) / 400 = 0.25, exp(2.25) = 9.49; (10 x 0.5 + 30 x 0.1) / 40 = 0.2, exp(2.2) = 9.03.
    let wanted = "\
1 rows repeat a text of the same format; the first of each counts.

alice

KV format      KL   top-1  change of NLL  perplexity  ratio  at the end  bits a scalar  MB read a step  tokens
packed     0.1000  90.0 %        +0.1000        8.17   4.00        3.60           4.00           0.625     100

code

KV format      KL   top-1  change of NLL  perplexity  ratio  at the end  bits a scalar  MB read a step  tokens
packed     0.3000  70.0 %        +0.3000        9.97   4.00        3.60           4.00           0.625     300

All texts

KV format      KL   top-1  change of NLL  perplexity  ratio  at the end  bits a scalar  MB read a step  tokens  prompts
packed     0.2500  75.0 %        +0.2500        9.49   4.00        3.60           4.00           0.625     400        2

Needle prompts in alice

KV format      KL   top-1  change of NLL  perplexity  ratio  at the end  bits a scalar  MB read a step  tokens  prompts
packed     0.2000  80.0 %        +0.2000        9.03   4.00        3.60           4.00           0.625      40        2

KL, one layer compressed, the others exact

layer  packed
3      0.0400
";
    assert_eq!(text, wanted);
}

#[test]
fn a_report_is_well_formed_and_refers_to_its_plots() {
    let files =
        vec![(settings("ruler"), ruler(20, &[4096, 8192, 16384, 32768])), (settings("kl"), divergences())];
    let report = Report::new(files);
    let (html, markdown, plots) = (report.html(), report.markdown(""), report.plots());
    let xml = html.strip_prefix("<!DOCTYPE html>\n").unwrap();
    let document = roxmltree::Document::parse(xml).unwrap();
    let inline = document.descendants().filter(|node| node.tag_name().name() == "svg").count();
    // Per length a curve, per method a map; per text (2), all texts, per text of needles (2), all needles a curve;
    // layers.
    assert_eq!((plots.len(), inline), (4 + METHODS.len() + 6 + 1, plots.len()));
    for (name, svg) in &plots {
        assert!(name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte)), "{name}");
        assert_eq!(plots.iter().filter(|plot| plot.0 == *name).count(), 1, "{name}");
        assert_eq!(markdown.matches(&format!("](<{name}>)")).count(), 1, "{name}");
        let plot = roxmltree::Document::parse(svg).unwrap();
        let size = |name: &str| plot.root_element().attribute(name).unwrap().parse::<f64>().unwrap();
        let (width, height) = (size("width"), size("height"));
        for node in plot.descendants().filter(|node| node.tag_name().name() == "text") {
            let at = |name: &str| node.attribute(name).unwrap().parse::<f64>().unwrap();
            assert!(
                (0.0..=width).contains(&at("x")) && (0.0..=height).contains(&at("y")),
                "{name}: {node:?}"
            );
        }
    }
    assert!(!html.contains("<script") && !html.contains("src=") && !html.contains("href="));
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("report");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("sample.html"), html).unwrap();
    std::fs::write(folder.join("sample.md"), markdown).unwrap();
    std::fs::write(folder.join("sample.txt"), table(&ruler(20, &[4096, 8192]))).unwrap();
    for (name, svg) in plots {
        std::fs::write(folder.join(name), svg).unwrap();
    }
    println!("a sample report is in {}", folder.display());
}

#[test]
fn text_from_files_stays_text() {
    let evil = "\"><img src=x onerror=alert(1)><script>alert(1)</script>&lt;'\u{0}\u{fffe}|`";
    let mut settings = settings("ruler");
    settings.model = evil.into();
    settings.suite = evil.into();
    settings.kv = vec![evil.into()];
    settings.options = [(evil.to_string(), evil.to_string()), ("command".into(), evil.into())].into();
    let mut row = answer(&format!("niah{evil}"), 4096, 0, (evil, 2.0), 0.5);
    row.depth = Some(0.5);
    let rows = vec![
        Row::Answer(row),
        Row::Kl(kl(evil, (evil, 2.0), 10, 0.1)),
        Row::Kl(kl(&format!("{evil} ask 1"), (evil, 2.0), 10, 0.1)),
        Row::Kl(KlRow { layer: Some(0), ..kl(evil, (evil, 2.0), 10, 0.1) }),
    ];
    let report = Report::new(vec![(settings, rows)]);
    let html = report.html();
    let document = roxmltree::Document::parse(html.strip_prefix("<!DOCTYPE html>\n").unwrap()).unwrap();
    let known = [
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "pre", "code",
        "div", "table", "thead", "tbody", "tr", "th", "td", "small", "wbr", "figure", "svg", "rect", "line",
        "polyline", "polygon", "circle", "text",
    ];
    for node in document.descendants().filter(|node| node.is_element()) {
        assert!(known.contains(&node.tag_name().name()), "{:?}", node.tag_name());
        assert!(node.attributes().all(|a| !a.name().starts_with("on") && a.name() != "src"), "{node:?}");
    }
    let shown =
        document.descendants().filter(|node| node.text().is_some_and(|text| text.contains("<script>")));
    assert!(shown.count() > 10);
    let plots = report.plots();
    assert_eq!(plots.len(), 5);
    for (name, svg) in plots {
        assert!(!name.contains(['/', '"', '<', ' ']), "{name}");
        assert!(roxmltree::Document::parse(&svg).is_ok() && !svg.contains("<script"), "{svg}");
    }
    let markdown = report.markdown("");
    let outside: Vec<&str> = markdown.split("```").step_by(2).collect();
    assert!(outside.iter().all(|text| !text.contains("<script") && !text.contains("<img")), "{markdown}");
}

#[test]
fn odd_results_are_reported_all_the_same() {
    let with = |rows: Vec<Row>| {
        let (text, report) = (table(&rows), Report::new(vec![(settings("ruler"), rows)]));
        assert!(report.html().ends_with("</html>\n"));
        (text, report.markdown(""))
    };
    assert!(with(vec![]).1.contains("There are no rows."));
    assert_eq!(table(&[]), "There are no rows.\n");
    assert!(Report::new(vec![]).markdown("").contains("There are no results."));

    let (text, _) = with(vec![Row::Answer(answer("a", 0, 0, ("packed", 2.0), 1.0))]);
    assert!(text.contains("no rows of exact"), "{text}");
    let one = vec![
        Row::Answer(answer("a", 0, 0, ("exact", 1.0), 1.0)),
        Row::Answer(answer("a", 0, 0, ("packed", 2.0), 0.5)),
    ];
    let (text, markdown) = with(one);
    // One pair: a difference, no interval.
    assert!(text.contains("-50.0              -  50.0 %        1"), "{text}");
    assert!(markdown.contains("50.0<br>-50.0 -<br>loss 50.0 %"), "{markdown}");
    with(vec![Row::Answer(answer("a", 0, 0, ("exact", 1e9), 0.0))]);
    with(vec![Row::Kl(kl("t", ("exact", 1e-9), 1, 0.0))]);
    with(vec![Row::Kl(KlRow { layer: Some(usize::MAX), ..kl("t", ("x", 1.0), usize::MAX, 1e6) })]);
    // Exact and packed have no sample in common.
    let apart = vec![
        Row::Answer(answer("a", 0, 0, ("exact", 1.0), 1.0)),
        Row::Answer(answer("a", 0, 1, ("packed", 2.0), 0.5)),
        Row::Answer(answer("a", 0, 1, ("packed", 2.0), 0.7)),
    ];
    let (text, _) = with(apart);
    assert!(text.contains("1 of 2") && text.contains("1 rows repeat"), "{text}");
    // As many names as rows: a table of all would have a thousand million cells.
    let names =
        (0..30_000).map(|i| Row::Answer(answer(&format!("t{i}"), i, i, (&format!("k{i}"), 2.0), 0.5)));
    let (_, markdown) = with(names.collect());
    assert!(markdown.contains("29800 tasks and their rows are left out"), "{}", &markdown[..2000]);
}

#[test]
fn files_are_compared_only_if_they_measured_the_same() {
    let rows = |kv: &str, score: f64| -> Vec<Row> {
        (0..4).map(|sample| Row::Answer(answer("a", 0, sample, (kv, 2.0), score))).collect()
    };
    let file = |seed: &str, kv: &str, score: f64| {
        let mut settings = settings("ruler");
        settings.options.insert("seed".into(), seed.into());
        settings.options.insert("command".into(), format!("mosaickv eval ruler --kv {kv}"));
        (settings, rows(kv, score))
    };
    let report =
        Report::new(vec![file("1", "exact", 1.0), file("1", "packed", 0.5), file("2", "other", 0.25)]);
    let markdown = report.markdown("");
    assert_eq!(markdown.matches("## tiny: ruler").count(), 2, "{markdown}");
    assert!(markdown.contains("| 50.0<br>-50.0 [-50.0, -50.0]<br>loss 50.0 % |"), "{markdown}");
    assert!(markdown.contains("| 4 | 25.0 |"), "{markdown}");
    assert!(markdown.contains("--kv exact") && markdown.contains("--kv packed"), "{markdown}");
}

#[test]
fn fifty_thousand_rows_take_seconds() {
    let rows = ruler(50_000 / METHODS.len() / 4 / 2, &[4096, 8192]);
    let start = Instant::now();
    let report = Report::new(vec![(settings("ruler"), rows)]);
    let (html, seconds) = (report.html(), start.elapsed().as_secs_f64());
    println!("{seconds:.2} s, {} bytes", html.len());
    assert!(seconds < 30.0, "{seconds} s");
}
