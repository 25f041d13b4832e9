//! `mosaickv eval report`: results files as tables and plots.

use super::write;
use anyhow::{Context, Result, bail};
use clap::Args;
use mosaickv_eval::report::Report;
use mosaickv_eval::results;
use std::path::{Path, PathBuf};

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    mosaickv eval report ruler.jsonl kl.jsonl --html report.html\n  \
    mosaickv eval report ruler.jsonl --md report.md   (plots in report-plots/)")]
pub struct ReportArgs {
    /// Results files of `mosaickv eval kl`, `ruler` and `longbench`
    #[arg(required = true, value_name = "RESULTS")]
    results: Vec<PathBuf>,
    /// One self-contained page, plots included
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Tables as Markdown; its plots are written to a folder beside it, as SVG
    #[arg(long, value_name = "FILE")]
    md: Option<PathBuf>,
}

pub fn report(args: &ReportArgs) -> Result<()> {
    if args.html.is_none() && args.md.is_none() {
        bail!("nothing to write; give --html FILE, --md FILE or both");
    }
    for written in args.html.iter().chain(&args.md) {
        if args.results.iter().any(|read| same_file(read, written)) {
            bail!("{} is a results file; write the report to another", written.display());
        }
    }
    let files = args.results.iter().map(|path| results::read(path)).collect::<Result<Vec<_>, _>>()?;
    let report = Report::new(files);
    if let Some(path) = &args.html {
        write(path, &report.html())?;
        println!("wrote {}", path.display());
    }
    if let Some(path) = &args.md {
        // Plots get a folder of their own, so that two reports in one place do not take each other's.
        let folder = format!("{}-plots", path.file_stem().unwrap_or_default().to_string_lossy());
        write(path, &report.markdown(&format!("{folder}/")))?;
        println!("wrote {}", path.display());
        let folder = path.with_file_name(folder);
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        for (name, svg) in report.plots() {
            write(&folder.join(name), &svg)?;
        }
        println!("wrote {}", folder.display());
    }
    Ok(())
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}
