//! `maskinv data pairs`.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use anyhow::{Result, bail};
use clap::Args;

use super::open;
use crate::cli::model::HubArgs;
use crate::cli::progress::Progress;
use crate::cli::{interrupt, print, tell};
use crate::data::{
    Dataset, Pair, csv_list, lfw_list, read_conditions, rows_without_images, sample_cross_pairs, sample_pairs,
    write_verification,
};
use crate::files::{check_writable, write_atomic};

/// Arguments of `maskinv data pairs`.
#[derive(Args, Debug)]
pub(super) struct PairsArgs {
    /// Folder of people, .rec, .tar or .parquet file, or list of images
    #[arg(value_name = "DATA")]
    data: PathBuf,
    /// New list: .txt (LFW's format) or .bin (images included) for `evaluate --pairs`, or .csv (columns a, b and same)
    /// for --real-masks
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Maximum number of genuine pairs (one person)
    #[arg(long, value_name = "N", default_value_t = 3000)]
    genuine: usize,
    /// Maximum number of impostor pairs (two people)
    #[arg(long, value_name = "N", default_value_t = 3000)]
    impostor: usize,
    /// Number of folds in a .txt list, 1 to 1000
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    folds: u16,
    /// Random seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Pair only references with probes. CSV with a column `file` (PERSON/IMAGE) and the column named by --column: 0
    /// for a reference, 1 for a probe; images without a row are left out
    #[arg(long, value_name = "CSV", requires = "column")]
    across: Option<PathBuf>,
    /// Column of the --across file that marks the probes, such as masked
    #[arg(long, value_name = "NAME", requires = "across")]
    column: Option<String>,
}

impl PairsArgs {
    pub(super) fn run(self, hub: &HubArgs) -> Result<()> {
        let out = self.output.display();
        if self.output.exists() {
            bail!("{out}: exists already");
        }
        let extension = self.output.extension().and_then(|x| x.to_str()).unwrap_or_default();
        if !["txt", "csv", "bin"].contains(&extension) {
            bail!("{out}: expected .txt, .csv or .bin");
        }
        check_writable(&self.output)?;
        let source = open(&self.data, hub)?;
        let images = source.images.as_ref();
        let pairs = self.draw(images)?;
        let num_genuine = pairs.iter().filter(|pair| pair.is_same).count();
        let num_impostor = pairs.len() - num_genuine;
        if num_genuine == 0 || num_impostor == 0 {
            bail!(
                "{}: expected genuine and impostor pairs, found {num_genuine} and {num_impostor}",
                source.path.display()
            );
        }
        match extension {
            "txt" => {
                let text = lfw_list(images, &pairs, self.folds.into(), &self.output)?;
                write_atomic(&self.output, text.as_bytes())?;
                let num = num_genuine.min(num_impostor) / usize::from(self.folds);
                return print(&format!("{out}: {} folds of {num} pairs of each kind", self.folds));
            }
            "csv" => write_atomic(&self.output, csv_list(images, &pairs, &self.output)?.as_bytes())?,
            _ => {
                let (stop, mut progress, num) = (interrupt::flag()?, Progress::new(), 2 * pairs.len());
                write_verification(images, &pairs, &self.output, &mut |num_done| {
                    progress.count("pairs", "images written", num_done + 1, num);
                    match stop.load(Ordering::Relaxed) {
                        true => Err(crate::Error::io(&self.output)(std::io::ErrorKind::Interrupted.into())),
                        false => Ok(()),
                    }
                })?;
            }
        }
        print(&format!("{out}: {num_genuine} genuine and {num_impostor} impostor pairs"))
    }

    fn draw(&self, images: &dyn Dataset) -> Result<Vec<Pair>> {
        let labels: Vec<u32> = (0..images.len()).map(|i| images.label(i)).collect();
        let (Some(path), Some(column)) = (&self.across, &self.column) else {
            return Ok(sample_pairs(&labels, self.genuine, self.impostor, self.seed));
        };
        let conditions = read_conditions(path, column)?;
        if let Some(left_out) = rows_without_images(&conditions, images) {
            tell(format_args!("{}: {left_out}", path.display()));
        }
        let is_probe = |index: usize| {
            let file = images.person_and_file(index);
            file.as_ref().and_then(|file| conditions.get(file)).copied()
        };
        let is_probe: Vec<Option<bool>> = (0..images.len()).map(is_probe).collect();
        let num_unknown = is_probe.iter().filter(|probe| probe.is_none()).count();
        if num_unknown > 0 {
            tell(format_args!("{}: no rows for {num_unknown} images, which are left out", path.display()));
        }
        Ok(sample_cross_pairs(&labels, &is_probe, self.genuine, self.impostor, self.seed))
    }
}
