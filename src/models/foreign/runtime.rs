//! The runtime: rten.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use rten::{Dimension, Model, ModelOptions, NodeId, RunOptions, ThreadPool, Value};
use rten_tensor::Tensor;
use rten_tensor::prelude::*;

use super::{Array, Output};
use crate::weights::OnnxFiles;

/// A graph that rten runs on as many threads as the engine's loops have.
pub(super) struct Runtime {
    model: Model,
    input: NodeId,
    threads: Arc<ThreadPool>,
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.model.fmt(f)
    }
}

/// Returns what `work` does, with a panic of the runtime as an error: what a file asks for is not ours.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(format!("the runtime panicked: {}", text.unwrap_or("it does not say why")))
    })
}

impl Runtime {
    /// Prepares a graph.
    ///
    /// # Errors
    /// Names the operation that the runtime lacks.
    pub fn open(files: OnnxFiles) -> Result<Self, String> {
        guarded(|| {
            let mut options = ModelOptions::with_all_ops();
            options.prepack_weights(true);
            for (name, bytes) in files.external {
                options.external_data(&name, bytes);
            }
            let model = options.load(files.bytes).map_err(|e| format!("rten cannot read it: {e}"))?;
            let input = match model.input_ids() {
                &[input] => input,
                inputs => return Err(format!("expected one input, found {}", inputs.len())),
            };
            let threads = Arc::new(ThreadPool::with_num_threads(rayon::current_num_threads()));
            Ok(Self { model, input, threads })
        })
    }

    /// Sizes of the input's axes; none for one that is open.
    pub fn input(&self) -> Vec<Option<usize>> {
        let size = |dimension: Dimension| match dimension {
            Dimension::Fixed(size) => Some(size),
            Dimension::Symbolic(_) => None,
        };
        self.model.input_shape(0).unwrap_or_default().into_iter().map(size).collect()
    }

    /// Number of weights.
    pub fn num_parameters(&self) -> usize {
        self.model.total_params()
    }

    /// Returns the outputs for an input.
    pub fn shapes(&self, images: Array) -> Result<Vec<Output>, String> {
        let outputs = self.model.output_ids();
        let found = self.values(images, outputs)?;
        let name = |id: &NodeId| self.model.node_info(*id).and_then(|info| info.name().map(str::to_owned));
        let names = outputs.iter().map(|id| name(id).unwrap_or_default());
        Ok(names.zip(found).map(|(name, value)| (name, value.shape().to_vec())).collect())
    }

    /// Returns the output of a name.
    pub fn run(&self, images: Array, output: &str) -> Result<Array, String> {
        let id = self.model.find_node(output).ok_or_else(|| format!("expected an output {output}"))?;
        let value = self.values(images, &[id])?.pop().ok_or("expected one output, found none")?;
        let shape = value.shape().to_vec();
        let tensor = value.into_tensor::<f32>().ok_or_else(|| format!("{output}: expected f32 as output"))?;
        Ok(Array { shape, values: tensor.to_vec() })
    }

    fn values(&self, images: Array, outputs: &[NodeId]) -> Result<Vec<Value>, String> {
        guarded(|| {
            let images = Tensor::from_data(&images.shape[..], images.values);
            let options = RunOptions::default().with_thread_pool(Some(self.threads.clone()));
            let found = self.model.run(vec![(self.input, images.into())], outputs, Some(options));
            found.map_err(|e| format!("rten cannot run it: {e}"))
        })
    }
}
