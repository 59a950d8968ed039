//! `maskinv data convert`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use super::open;
use crate::cli::model::HubArgs;
use crate::cli::progress::Progress;
use crate::cli::{interrupt, print};
use crate::data::{
    Dataset, Export, IdentityFilter, Source, Subset, open_source, write_folder, write_records, write_shards,
};
use crate::error::missing_feature;
use crate::files::write_atomic;

/// Lists of a data set that are copied with it.
const LISTS: [&str; 3] = ["people.txt", "pairs.txt", "landmarks5.csv"];

/// Arguments of `maskinv data convert`.
#[derive(Args, Debug)]
pub(super) struct ConvertArgs {
    /// Folder of people, .rec, .tar or .parquet file, or list of images
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// New .rec or .parquet file, or new folder in the format given by --to; the lists of people, pairs and landmarks
    /// that belong to IN and its verification file are copied too, as NAME.pairs.txt and so on beside a file NAME.rec
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Output format [default: from the extension of OUT]
    #[arg(long, value_enum)]
    to: Option<Target>,
    /// Number of images per tar file
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    shard_size: u32,
    /// Leave out people with fewer than N images
    #[arg(long, value_name = "N", default_value_t = 1)]
    min_images: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// MXNet's RecordIO in insightface's layout: .rec, .idx, .lst and property
    Recordio,
    /// One folder per person
    Folder,
    /// Tar files with labels in .cls files
    Webdataset,
    /// A parquet file in the Hugging Face hub's layout
    Parquet,
}

impl ConvertArgs {
    pub(super) fn run(self, hub: &HubArgs) -> Result<()> {
        let (target, path) = self.target()?;
        let source = open(&self.input, hub)?;
        let images: Arc<dyn Dataset> = match self.min_images {
            0 | 1 => source.images.clone(),
            min_images => {
                let filter = IdentityFilter { min_images, names: None };
                Arc::new(Subset::new(source.images.clone(), &filter, &source.path)?)
            }
        };
        // Beside a file lists bear its name, since other sets may lie there; a folder is the set's own.
        let is_among_others = path == self.output && matches!(target, Target::Recordio | Target::Parquet);
        let copy = |(name, list): (String, PathBuf)| match is_among_others {
            true => (path.with_extension(name), list),
            false => (self.output.join(name), list),
        };
        let lists: Vec<(PathBuf, PathBuf)> = lists_of(&source, target, is_among_others).into_iter().map(copy).collect();
        if let Some((there, _)) = lists.iter().find(|(copy, _)| copy.exists()) {
            bail!("{}: exists already, and would count as a list of the new set", there.display());
        }
        let mut progress = Progress::new();
        let mut on = |done| progress.count("convert", "images written", done, images.len());
        let stop = interrupt::flag()?;
        let mut export = Export::new(images.as_ref(), &mut on).stopped_by(&stop);
        match target {
            Target::Recordio => write_records(&mut export, &path)?,
            Target::Webdataset => write_shards(&mut export, &path, self.shard_size as usize)?,
            Target::Folder if lists.is_empty() => write_folder(&mut export, &path)?,
            // The lists go beside the images, so the images get a folder of their own.
            Target::Folder => write_folder(&mut export, &path.join("images"))?,
            Target::Parquet => write_parquet(&mut export, &path)?,
        }
        for (copy, list) in &lists {
            write_atomic(copy, &std::fs::read(list).with_context(|| list.display().to_string())?)?;
        }
        print(&open_source(&path)?.to_string())
    }

    /// Returns the format, and the file or folder to write.
    fn target(&self) -> Result<(Target, PathBuf)> {
        let extension = self.output.extension().map(|x| x.to_string_lossy().to_ascii_lowercase());
        let by_extension = match extension.as_deref() {
            Some("rec") => Some(Target::Recordio),
            Some("parquet") => Some(Target::Parquet),
            _ => None,
        };
        let out = self.output.display();
        let path = match (self.to.or(by_extension), by_extension) {
            (None, _) => bail!("{out}: expected .rec or .parquet, or a folder with --to"),
            (Some(to), Some(by)) if to != by => bail!("{out}: the extension does not match --to"),
            (Some(_), Some(_)) | (Some(Target::Folder), None) => self.output.clone(),
            (Some(Target::Webdataset), None) if self.output.exists() => bail!("{out}: exists already"),
            (Some(Target::Webdataset), None) => self.output.clone(),
            (Some(Target::Parquet), _) if !cfg!(feature = "parquet") => bail!("{out}: {}", missing_feature("parquet")),
            (Some(Target::Recordio), None) => self.output.join("train.rec"),
            (Some(Target::Parquet), None) => self.output.join("train.parquet"),
        };
        Ok((self.to.or(by_extension).expect("checked above"), path))
    }
}

/// Returns the lists that belong to a data set, and its verification file, by the names of their copies.
fn lists_of(source: &Source, target: Target, is_named: bool) -> Vec<(String, PathBuf)> {
    let lists = LISTS.iter().filter_map(|name| Some(((*name).to_owned(), source.beside(name)?)));
    // Beside a folder or shards nobody would look for a verification file.
    let is_file = matches!(target, Target::Recordio | Target::Parquet);
    // `train.bin` belongs to `train.rec` wherever it lies.
    let named = |path: PathBuf| match target {
        Target::Recordio | Target::Parquet if is_named => ("bin".to_owned(), path),
        _ => ("train.bin".to_owned(), path),
    };
    let verification = source.verification_beside().filter(|_| is_file).map(named);
    lists.chain(verification).collect()
}

#[cfg(feature = "parquet")]
fn write_parquet(export: &mut Export, path: &Path) -> Result<()> {
    Ok(crate::data::write_parquet(export, path)?)
}

#[cfg(not(feature = "parquet"))]
fn write_parquet(_export: &mut Export, path: &Path) -> Result<()> {
    bail!("{}: {}", path.display(), crate::error::missing_feature("parquet"))
}
