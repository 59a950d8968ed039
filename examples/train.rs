//! The main job: trains a teacher on clean faces, then students that learn from it on masked ones, and compares all of
//! them on people they have never seen.
//!
//! ```text
//! cargo run --release --example train                    # procedural faces, two minutes on two cores
//! cargo run --release --example train -- --data DIR      # a folder of identities
//! cargo run --release --example train -- --help
//! ```

fn main() -> std::process::ExitCode {
    maskinv::cli::train_main()
}
