//! The command line: parses flags, shows progress on stderr, prints results on stdout.

mod align;
mod allocator;
mod bootstrap;
mod calibrate;
mod compare;
mod convert;
mod data;
mod decision;
mod device;
mod download;
mod dry_run;
mod embed;
mod evaluate;
mod find_lr;
mod gallery;
mod info;
mod interrupt;
mod launch;
mod mask;
mod metrics;
mod model;
mod model_file;
mod photos;
mod progress;
mod quantize;
mod ranks;
mod results;
mod run_report;
mod runs;
mod settings;
mod threads;
mod train;
mod verify;

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

use align::AlignArgs;
use calibrate::CalibrateArgs;
use compare::CompareArgs;
use convert::ConvertArgs;
use data::DataArgs;
use download::DownloadArgs;
use embed::EmbedArgs;
use evaluate::EvaluateArgs;
use gallery::{EnrolArgs, GalleryArgs, SearchArgs};
use info::InfoArgs;
use launch::num_launched;
use mask::MaskArgs;
use metrics::MetricsArgs;
use quantize::QuantizeArgs;
use runs::RunsArgs;
use train::TrainArgs;
use verify::VerifyArgs;

pub use allocator::keep_freed_memory;

use crate::data::ImageFiles;
use crate::files::UnfinishedFolder;

/// Mask-invariant face recognition: train, evaluate and use MaskInv.
#[derive(Debug, Parser)]
#[command(name = "maskinv", version, about, long_about = LONG_ABOUT)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const LONG_ABOUT: &str = "\
Mask-invariant face recognition: train, evaluate and use MaskInv (Huber et al., FG 2021).

Face images are personal data. Use them with the consent and under the licence that your data set needs, and look at \
the error rates that `maskinv evaluate` measures before anything depends on a match.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Trains a teacher on clean faces and students on masked ones, and compares them on unseen people
    Train(TrainArgs),
    /// Lists training runs with their progress, or compares some: settings and metrics
    Runs(RunsArgs),
    /// Measures checkpoints on clean and masked faces of unseen people
    Evaluate(EvaluateArgs),
    /// Computes metrics from any system's scores: error rates, thresholds, intervals, groups
    Metrics(MetricsArgs),
    /// Compares systems that scored the same pairs, and tests whether they differ by more than chance
    Compare(CompareArgs),
    /// Chooses thresholds for given false match rates and writes a copy of the model that contains them
    Calibrate(CalibrateArgs),
    /// Says whether two photos or aligned crops show one person, by a calibrated or given threshold
    Verify(VerifyArgs),
    /// Adds the faces of photos to a gallery of known people (feature gallery)
    Enrol(EnrolArgs),
    /// Searches a gallery for the people of faces (feature gallery)
    Search(SearchArgs),
    /// Shows, checks and exports a gallery, and removes people from it (feature gallery)
    Gallery(GalleryArgs),
    /// Finds the faces of photos and writes each aligned, as a data set
    Align(AlignArgs),
    /// Draws masks onto the faces of photos or onto aligned face crops
    Mask(MaskArgs),
    /// Shows, converts and checks data sets, and draws pairs to test on
    Data(DataArgs),
    /// Turns photos or aligned face crops into embeddings
    Embed(EmbedArgs),
    /// Shows a model's network and preprocessing, and how they were recognised
    Info(InfoArgs),
    /// Converts a checkpoint of any supported format to safetensors or ONNX
    Convert(ConvertArgs),
    /// Quantises a model to 8-bit integers, with ranges of activations from face images
    Quantize(QuantizeArgs),
    /// Downloads a model from the Hugging Face hub (feature hub), or lists well-known ones
    Download(DownloadArgs),
}

/// Runs the command line of this process; exits with 0, 1 for an error, 2 for wrong usage, 3 for a photo without the
/// face that is asked for, 75 for a command that was asked to stop and can go on.
pub fn main() -> ExitCode {
    allocator::keep_freed_memory();
    let command = Cli::parse().command;
    if !matches!(command, Command::Train(_) | Command::Evaluate(_)) && num_launched() > 1 {
        // Each process would do the same work and overwrite the others' files.
        let what = "only train and evaluate run on several ranks: start this command on its own";
        return exit_code(Err(anyhow::anyhow!(what)));
    }
    match command {
        Command::Train(args) => exit_code(args.run()),
        Command::Runs(args) => exit_code(args.run()),
        Command::Evaluate(args) => exit_code(args.run()),
        Command::Metrics(args) => exit_code(args.run()),
        Command::Compare(args) => exit_code(args.run()),
        Command::Calibrate(args) => exit_code(args.run()),
        Command::Verify(args) => exit_code(args.run()),
        Command::Enrol(args) => exit_code(args.run()),
        Command::Search(args) => exit_code(args.run()),
        Command::Gallery(args) => exit_code(args.run()),
        Command::Align(args) => exit_code(args.run()),
        Command::Mask(args) => exit_code(args.run()),
        Command::Data(args) => exit_code(args.run()),
        Command::Embed(args) => exit_code(args.run()),
        Command::Info(args) => exit_code(args.run()),
        Command::Convert(args) => exit_code(args.run()),
        Command::Quantize(args) => exit_code(args.run()),
        Command::Download(args) => exit_code(args.run()),
    }
}

/// Runs `maskinv train` with its own parser, for the example.
pub fn train_main() -> ExitCode {
    /// Trains a teacher on clean faces and students on masked ones, and compares them on unseen people.
    #[derive(Parser)]
    #[command(name = "train", version)]
    struct TrainCli {
        #[command(flatten)]
        args: TrainArgs,
    }
    allocator::keep_freed_memory();
    exit_code(TrainCli::parse().args.run())
}

/// Exit code for an error.
const FAILED: u8 = 1;

/// Exit code of a command that was asked to stop and can go on: EX_TEMPFAIL of sysexits.h.
const STOPPED: u8 = 75;

/// Exit code for a photo without a face, or with several where one is asked for.
const NO_FACE: u8 = 3;

/// Prints an error as one line on stderr; exit code 1 then, [`NO_FACE`] or [`STOPPED`], else 0.
fn exit_code(result: Result<()>) -> ExitCode {
    result.map_or_else(|error| told(&error).into(), |()| ExitCode::SUCCESS)
}

/// Prints an error and returns its exit code.
fn told(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<crate::Error>() {
        Some(stopped @ crate::Error::Stopped { .. }) => {
            tell(format_args!("{stopped}; {error}"));
            STOPPED
        }
        found => {
            let _ = writeln!(std::io::stderr().lock(), "error: {}", one_line(error));
            match found {
                Some(crate::Error::Face { .. }) => NO_FACE,
                // The same command goes on.
                Some(error) if error.is_interruption() => STOPPED,
                _ => FAILED,
            }
        }
    }
}

/// The chain of causes on one line, without the stack that candle appends to its messages under `RUST_BACKTRACE`.
fn one_line(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        let text = text.lines().take_while(|line| !line.trim_start().starts_with("0: ")).collect::<Vec<_>>().join(" ");
        if !parts.iter().any(|p| p.contains(&text)) {
            parts.push(text);
        }
    }
    parts.join(": ")
}

/// Writes a line to stdout, on the first rank; that nobody reads on is no error.
fn print(text: &str) -> Result<()> {
    if IS_SILENT.load(Ordering::Relaxed) {
        return Ok(());
    }
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// Whether this process is a rank that leaves it to the first to say what all do.
static IS_SILENT: AtomicBool = AtomicBool::new(false);

/// Writes a line to stderr, on the first rank; that it cannot be written is no reason to stop.
fn tell(text: std::fmt::Arguments) {
    if !IS_SILENT.load(Ordering::Relaxed) {
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    }
}

/// A number with what is counted, such as `1 photo` and `2 photos`.
fn count_of(num: usize, what: &str) -> String {
    if num == 1 { format!("1 {what}") } else { format!("{num} {what}s") }
}

/// Says so if the folder's work starts again from the beginning.
fn tell_if_anew(folder: &UnfinishedFolder) {
    if folder.is_begun_anew() {
        tell(format_args!("begins anew: an earlier command was interrupted, but its images or settings were others"));
    }
}

/// Reads a rate given as a flag.
fn rate(text: &str) -> std::result::Result<f64, String> {
    let value = text.parse().ok().filter(|v| (f64::MIN_POSITIVE..1.0).contains(v));
    value.ok_or_else(|| "expected a fraction above 0 and below 1".to_owned())
}

/// Writes JSON to stdout.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}

/// The images at `path`, a file or a folder with sub-folders, in name order. Hidden folders and those of the system are
/// passed over, and a folder that is reached again over a link is taken once.
fn list_images(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        let data = std::fs::metadata(path).with_context(|| path.display().to_string())?;
        // Reading a pipe would wait for somebody to write to it.
        anyhow::ensure!(data.is_file(), "{}: expected an image or a folder, found neither", path.display());
        return Ok(vec![path.to_owned()]);
    }
    let (found, others) = ImageFiles::find(path)?;
    if let Some(first) = others.first() {
        let (num, folder, first) = (others.len(), path.display(), first.display());
        tell(format_args!("{folder}: {num} images in formats that are not read, the first {first}, are passed over"));
    }
    if found.is_empty() {
        bail!("{}: expected images, found none", path.display());
    }
    Ok(found)
}
