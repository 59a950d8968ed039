//! `maskinv enrol`, `maskinv search` and `maskinv gallery`.
#![cfg_attr(not(feature = "gallery"), allow(dead_code, reason = "without it, the commands say how to get it"))]

#[cfg(feature = "gallery")]
mod enrol;
#[cfg(feature = "gallery")]
mod export;
#[cfg(feature = "gallery")]
mod faces;
#[cfg(feature = "gallery")]
mod manage;
#[cfg(feature = "gallery")]
mod search;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};

use super::decision::Setting;
use super::device::DeviceArgs;
use super::model::HubArgs;
use super::photos::{PhotoArgs, UnusableArgs, WhichArgs};
use super::threads::ThreadsArgs;

/// Arguments of `maskinv enrol`.
#[derive(Args, Debug)]
pub struct EnrolArgs {
    /// Gallery, a file, which is made if there is none
    #[arg(value_name = "GALLERY")]
    gallery: PathBuf,
    /// Photos or aligned crops, or folders of them (searched recursively)
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Person whom all the images show [default: the name of the folder that an image is in, below a folder that was
    /// given; else the name of the image's file]
    #[arg(long, value_name = "NAME")]
    person: Option<String>,
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    unusable: UnusableArgs,
}

/// Arguments of `maskinv search`.
#[derive(Args, Debug)]
pub struct SearchArgs {
    /// Gallery
    #[arg(value_name = "GALLERY")]
    gallery: PathBuf,
    /// Photos or aligned crops, or folders of them (searched recursively)
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Number of people to list for each face
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    top: u16,
    /// Highest share of strangers who may be taken for somebody in the gallery (FPIR); the threshold follows from it,
    /// the number of people and the model's calibration
    #[arg(help_heading = "Decision", long, value_name = "RATE", default_value_t = 0.01, value_parser = super::rate)]
    fpir: f64,
    /// Lowest cosine that counts as a match, -1 to 1, overriding the model's thresholds
    #[arg(help_heading = "Decision", long, value_name = "COSINE", allow_negative_numbers = true,
        value_parser = super::decision::cosine)]
    threshold: Option<f64>,
    /// Who wears a mask, instead of what the model's mask head sees
    #[arg(help_heading = "Decision", long, value_enum, value_name = "WHO", conflicts_with = "threshold")]
    setting: Option<Setting>,
    /// How several faces of a person become one score
    #[arg(long, value_enum, default_value_t = PoolArg::Best)]
    pool: PoolArg,
    /// Precision of the first look at all faces; scores are computed in f32 in any case
    #[arg(long, value_enum, default_value_t = ColumnArg::Int8)]
    column: ColumnArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    unusable: UnusableArgs,
}

/// Flags of `enrol` and `search`.
#[derive(Args, Debug)]
struct CommonArgs {
    /// Checkpoint (safetensors, .pth, ONNX or MXNet .params), folder of a trained arm (runs/NAME/ARM), or, with the
    /// feature hub, hf://owner/repo/file or a short name of `download --list` [default: the gallery's own]
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    #[command(flatten)]
    which: WhichArgs,
    #[command(flatten)]
    photos: PhotoArgs,
    #[command(flatten)]
    threads: ThreadsArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    hub: HubArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PoolArg {
    /// The highest of their scores
    Best,
    /// The score of their mean embedding
    Mean,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ColumnArg {
    /// 32-bit floats
    F32,
    /// 16-bit floats
    F16,
    /// 8-bit integers
    Int8,
}

/// Arguments of `maskinv gallery`.
#[derive(Args, Debug)]
pub struct GalleryArgs {
    #[command(subcommand)]
    command: GalleryCommand,
}

#[derive(Debug, Subcommand)]
enum GalleryCommand {
    /// Shows the number of people and faces, the model and the size
    Info(FileArgs),
    /// Lists the people, or the faces of some
    List(ListArgs),
    /// Removes people or single faces, and overwrites them in the file
    Remove(RemoveArgs),
    /// Writes the embeddings for vector databases: .npy with a .csv beside it, or .parquet (feature parquet)
    Export(ExportArgs),
    /// Gives back the space of what was removed
    Compact {
        /// Gallery
        #[arg(value_name = "GALLERY")]
        gallery: PathBuf,
    },
    /// Checks every page and every face of the file
    Check(FileArgs),
}

#[derive(Args, Debug)]
struct FileArgs {
    /// Gallery
    #[arg(value_name = "GALLERY")]
    gallery: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct ListArgs {
    #[command(flatten)]
    file: FileArgs,
    /// People whose faces to list
    #[arg(value_name = "PERSON")]
    people: Vec<String>,
}

#[derive(Args, Debug)]
struct RemoveArgs {
    /// Gallery
    #[arg(value_name = "GALLERY")]
    gallery: PathBuf,
    /// People to remove with all their faces
    #[arg(value_name = "PERSON", required_unless_present = "face")]
    people: Vec<String>,
    /// Number of a face to remove, as `gallery list` shows it; may be repeated
    #[arg(long, value_name = "NUMBER", conflicts_with = "people")]
    face: Vec<i64>,
}

#[derive(Args, Debug)]
struct ExportArgs {
    /// Gallery
    #[arg(value_name = "GALLERY")]
    gallery: PathBuf,
    /// New .npy file, f32 of shape (faces, elements), with a .csv of the faces beside it, or new .parquet file
    #[arg(value_name = "OUT")]
    output: PathBuf,
}

/// Runs a command of the feature gallery.
macro_rules! with_gallery {
    ($run:expr) => {{
        #[cfg(feature = "gallery")]
        let result = $run;
        #[cfg(not(feature = "gallery"))]
        let result = Err(anyhow::anyhow!(crate::error::missing_feature("gallery")));
        result
    }};
}

impl EnrolArgs {
    /// Adds faces to a gallery.
    ///
    /// # Errors
    /// When the build lacks the feature, the gallery is another model's, or an image cannot be used.
    pub fn run(self) -> Result<()> {
        with_gallery!(enrol::run(&self))
    }
}

impl SearchArgs {
    /// Searches a gallery for the people of faces.
    ///
    /// # Errors
    /// As [`EnrolArgs::run`].
    pub fn run(self) -> Result<()> {
        with_gallery!(search::run(&self))
    }
}

impl GalleryArgs {
    /// Shows or changes a gallery.
    ///
    /// # Errors
    /// When the build lacks the feature, or the gallery cannot be read or written.
    pub fn run(self) -> Result<()> {
        with_gallery!(match self.command {
            GalleryCommand::Info(args) => manage::info(&args),
            GalleryCommand::List(args) => manage::list(&args),
            GalleryCommand::Remove(args) => manage::remove(&args),
            GalleryCommand::Export(args) => export::run(&args),
            GalleryCommand::Compact { gallery } => manage::compact(&gallery),
            GalleryCommand::Check(args) => manage::check(&args),
        })
    }
}
