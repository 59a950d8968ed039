//! The main job: trains a teacher on clean faces, then students that learn from it on masked ones, and compares all of
//! them on people they have never seen.
//!
//! ```text
//! cargo run --release --example train                    # procedural faces, some minutes on two cores
//! cargo run --release --example train -- --data DIR      # a folder of identities
//! cargo run --release --example train -- --help
//! ```

use std::process::ExitCode;

use clap::Parser;
use maskinv::cli::{TrainArgs, exit_code};

/// Trains a teacher on clean faces and students on masked ones, and compares them on unseen people.
#[derive(Parser)]
#[command(name = "train", version)]
struct Args {
    #[command(flatten)]
    train: TrainArgs,
}

fn main() -> ExitCode {
    exit_code(Args::parse().train.run())
}
