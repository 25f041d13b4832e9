//! `mosaickv eval report`: results files as tables and plots.

use super::write;
use anyhow::{Result, bail};
use clap::Args;
use mosaickv_eval::report::Report;
use mosaickv_eval::results;
use std::path::PathBuf;

#[derive(Args)]
#[command(after_help = "Examples:\n  \
    mosaickv eval report ruler.jsonl kl.jsonl --html report.html\n  \
    mosaickv eval report ruler.jsonl --md report.md   (plots as SVG files beside it)")]
pub struct ReportArgs {
    /// Results files of `mosaickv eval kl`, `ruler` and `longbench`
    #[arg(required = true, value_name = "RESULTS")]
    results: Vec<PathBuf>,
    /// One self-contained page, plots included
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Tables as Markdown; its plots are written beside it as SVG
    #[arg(long, value_name = "FILE")]
    md: Option<PathBuf>,
}

pub fn report(args: &ReportArgs) -> Result<()> {
    if args.html.is_none() && args.md.is_none() {
        bail!("nothing to write; give --html FILE, --md FILE or both");
    }
    let files = args.results.iter().map(|path| results::read(path)).collect::<Result<Vec<_>, _>>()?;
    let report = Report::new(files);
    if let Some(path) = &args.html {
        write(path, &report.html())?;
        println!("wrote {}", path.display());
    }
    if let Some(path) = &args.md {
        write(path, &report.markdown(""))?;
        println!("wrote {}", path.display());
        for (name, svg) in report.plots() {
            let plot = path.with_file_name(name);
            write(&plot, &svg)?;
            println!("wrote {}", plot.display());
        }
    }
    Ok(())
}
