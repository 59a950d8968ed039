//! What is known of how convolutions run.

use std::fmt;

use serde::Serialize;

/// How a pass of a convolution runs on a GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ConvolutionPass {
    /// What is computed: the output, or a gradient.
    pub pass: &'static str,
    /// Images, height, width and channels in, channels out, filter, stride.
    pub convolution: String,
    /// Algorithm and math.
    pub algorithm: String,
    /// Time that the library measured, in milliseconds.
    pub milliseconds: Option<f32>,
    /// Bytes of workspace.
    pub workspace_bytes: usize,
}

/// Prints a row of a table: convolution, pass, milliseconds, megabytes of workspace, algorithm.
impl fmt::Display for ConvolutionPass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pass, convolution, algorithm, milliseconds, workspace_bytes } = self;
        let ms = milliseconds.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.4}"));
        let megabytes = *workspace_bytes as f64 / 1e6;
        write!(f, "{convolution:36}  {pass:23}  {ms:>9}  {megabytes:>9.1}  {algorithm}")
    }
}

impl ConvolutionPass {
    /// Heads of the columns that a row prints.
    pub fn heads() -> String {
        format!("{:36}  {:23}  {:>9}  {:>9}  algorithm", "convolution", "pass", "ms", "MB")
    }
}
