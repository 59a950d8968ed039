//! The `maskinv` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    maskinv::cli::main()
}
