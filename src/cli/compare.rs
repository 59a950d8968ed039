//! `maskinv compare`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::bootstrap::BootstrapArgs;
use super::{print, print_json};
use crate::eval::{compare_systems, comparison_table, read_scores};

/// Which systems.
#[derive(Args, Debug)]
pub struct CompareArgs {
    /// CSVs of scores of the same pairs in the same order, as `evaluate --scores` writes them; the first is what the others are
    /// compared with
    #[arg(required = true, num_args = 2.., value_name = "SCORES")]
    scores: Vec<PathBuf>,
    #[command(flatten)]
    bootstrap: BootstrapArgs,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

impl CompareArgs {
    /// Compares the systems and prints a table.
    ///
    /// # Errors
    /// When a file is wrong or the systems scored other pairs.
    pub fn run(self) -> Result<()> {
        let bootstrap = self.bootstrap.config()?;
        let read = |path: &PathBuf| Ok(read_scores(path, None)?.comparisons);
        let systems = self.scores.iter().map(read).collect::<Result<Vec<_>>>()?;
        let names: Vec<String> = self.scores.iter().map(|path| path.display().to_string()).collect();
        let figures = compare_systems(&systems, &bootstrap).with_context(|| names.join(", "))?;
        if self.json {
            return print_json(&serde_json::json!({
                "version": env!("CARGO_PKG_VERSION"),
                "commit": env!("MASKINV_COMMIT"),
                "systems": names,
                "bootstrap": bootstrap,
                "figures": figures,
            }));
        }
        print(&comparison_table(&names, &figures, bootstrap.confidence))
    }
}
