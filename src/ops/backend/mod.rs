//! What a device does in training: arrays in its memory, losses, updates ([`Backend`]), and the steps of a network
//! ([`Kernels`]).

mod kernels;
mod layout;
mod order;

use std::borrow::Cow;
use std::fmt::Debug;
use std::ops::Range;

use candle_core::Result;

use super::adamw::AdamWStep;
use super::distance::DistillKind;
use super::margin_loss::MarginTask;
use super::sgd::SgdStep;
use crate::dist::{Collective, Ranks};
pub use kernels::{
    Activation, ConvShape, FullGrad, Grads, Int8Filter, Kernels, MapGrad, NormGrad, NormParams, Part, Place, Scale,
    Scaling, Source, Statistics, Sums, Weight,
};
pub use layout::{Buffer, BufferId, MemoryLayout};
pub use order::Order;

/// A device. Arrays are f32 in its memory; work is done in the order of the calls, and a GPU's is waited for only where
/// something is read.
pub trait Backend: Clone + Debug + Send + Sync + 'static {
    /// Numbers in the device's memory.
    type Array: Debug + Send + Sync;
    /// One number that was computed.
    type Scalar: Debug + Send + Sync;
    /// Norm of the gradients of a step, clipping factor, and whether the step is finite.
    type Guard: Debug + Send + Sync;
    /// Gradients on their way to a sum over all ranks.
    type Bucket;

    /// Whether results are known when a call returns.
    const IS_SYNCHRONOUS: bool;
    /// Alignment of parameters in an array, in elements. Arrays of one parameter whose length is a multiple of it have
    /// no padding, which the losses rely on.
    const ALIGNMENT: usize;

    /// Does the work of a step on a thread that suits the device.
    fn enter<R: Send>(work: impl FnOnce() -> R + Send) -> R;

    /// Returns zeros.
    fn zeros(&self, len: usize) -> Result<Self::Array>;
    /// Moves values to the device.
    fn upload(&self, values: Vec<f32>) -> Result<Self::Array>;
    /// Replaces all values of an array.
    fn write(&self, y: &mut Self::Array, values: &[f32]) -> Result<()>;
    /// Returns a number that is known already.
    fn scalar(&self, value: f64) -> Result<Self::Scalar>;
    /// Waits for the values of an array.
    fn read<'a>(&self, x: &'a Self::Array) -> Result<Cow<'a, [f32]>>;
    /// Waits for a number.
    fn read_scalar(&self, x: &Self::Scalar) -> Result<f64>;
    /// Returns a copy of parameters in the type of the products, unless that is f32.
    fn short(&self, x: &Self::Array) -> Result<Option<Self::Array>>;

    /// `y += x`.
    fn add(&self, y: &mut Self::Array, x: &Self::Array) -> Result<()>;
    /// `y += share * (x - y)`, unless the guard found the step not finite.
    fn average(&self, y: &mut Self::Array, x: &Self::Array, share: f64, guard: &Self::Guard) -> Result<()>;

    /// Returns a guard that has seen no step.
    fn guard(&self) -> Result<Self::Guard>;
    /// Measures the norm of the gradients of a step's parameters, which lie in `places`, and the factor that scales it
    /// down to `max_norm` if it is larger; 0 turns clipping off. The step is finite if the norm and the weighted sum of
    /// `losses` are.
    fn measure(
        &self,
        guard: &mut Self::Guard,
        grads: &Self::Array,
        places: &[Range<usize>],
        max_norm: f64,
        losses: &[(f64, &Self::Scalar)],
    ) -> Result<()>;
    /// Waits for what was measured.
    fn read_guard(&self, guard: &Self::Guard) -> Result<GuardState>;
    /// Updates parameters by [`sgd_step`](super::sgd::sgd_step), unless the guard found the step not finite; the guard
    /// has the factor of the gradients, not the step.
    fn sgd(&self, update: Update<Self>, velocity: &mut Self::Array, step: SgdStep) -> Result<()>;
    /// Updates parameters by [`adamw_step`](super::adamw::adamw_step), as [`Self::sgd`] does.
    fn adamw(&self, update: Update<Self>, means: [&mut Self::Array; 2], step: AdamWStep) -> Result<()>;

    /// Checks that embeddings of this length can be trained.
    fn check_embedding_size(&self, size: usize) -> Result<()>;
    /// Layout of class centres `(size, classes)`.
    fn centres_order(&self, size: usize, classes: usize) -> Order;
    /// Returns the margin loss of embeddings `(N, d)`, and its weighted gradient with respect to them; writes that of
    /// the class centres. If ranks share the classes, the gradients of the embeddings on all of them have to be added.
    fn margin_loss(
        &self,
        embeddings: &Self::Array,
        centres: &Self::Array,
        task: MarginTask,
        of_centres: &mut Self::Array,
    ) -> Result<MarginLoss<Self>>;
    /// Returns the distance of two batches `(n, d)`, and `weight` times its gradient with respect to the student's;
    /// `row_weights` are as in [`distance_with_gradient`](super::distance::distance_with_gradient).
    fn distance(
        &self,
        student: &Self::Array,
        teacher: &Self::Array,
        n: usize,
        kind: DistillKind,
        weight: f64,
        row_weights: Option<&[f32]>,
    ) -> Result<(Self::Scalar, Self::Array)>;
    /// Pulls class centres towards the teacher's embeddings `(n, d)`, as [`pull_centres`](super::centres::pull_centres)
    /// does.
    fn pull_centres(
        &self,
        centres: &mut Self::Array,
        student: &Self::Array,
        teacher: &Self::Array,
        labels: &[i64],
    ) -> Result<()>;
    /// Returns the class centres, or their moments, `(size, classes)`, of some classes.
    fn select_classes(&self, all: &Self::Array, size: usize, classes: &[u32]) -> Result<Self::Array>;
    /// Inverse of [`Self::select_classes`]: replaces those of these classes.
    fn replace_classes(&self, all: &mut Self::Array, size: usize, classes: &[u32], by: &Self::Array) -> Result<()>;
    /// Does a collective operation on the arrays of all ranks, which are as long as each other.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    fn collect(&self, x: &Self::Array, how: Collective, ranks: &Ranks) -> crate::Result<Self::Array>;
    /// Replaces each number by its mean over all ranks.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    fn average_scalars(&self, numbers: &mut [&mut Self::Scalar], ranks: &Ranks) -> crate::Result<()>;
    /// Begins to add ranges of gradients over all ranks. Their padding may be added too.
    ///
    /// # Errors
    /// When they cannot be sent.
    fn send(&self, grads: &Self::Array, ranges: Vec<Range<usize>>, ranks: &Ranks) -> crate::Result<Self::Bucket>;
    /// Waits for the sums and writes them to the ranges they belong to.
    ///
    /// # Errors
    /// When the ranks cannot exchange them.
    fn receive(&self, bucket: Self::Bucket, grads: &mut Self::Array) -> crate::Result<()>;
    /// Replaces a range of the elements of `y` by those of `x`, which is not padded.
    fn set_part(&self, y: &mut Self::Array, elements: Range<usize>, x: &Self::Array) -> Result<()>;
    /// Returns a range of the elements of an array, which must not be written while that of the whole is used.
    fn part(&self, x: &Self::Array, elements: Range<usize>) -> Result<Self::Array>;
    /// Returns the arrays one after the other, none of which is padded.
    fn join(&self, parts: &[&Self::Array]) -> Result<Self::Array>;
    /// Returns `x w^T`: `x: (n, k)`, `w: (m, k)`; sizes are `[n, k, m]`.
    fn linear(&self, x: &Self::Array, w: &Self::Array, sizes: [usize; 3]) -> Result<Self::Array>;
    /// Returns the gradient of `x` in [`Self::linear`] and writes that of `w`.
    fn linear_backward(
        &self,
        x: &Self::Array,
        w: &Self::Array,
        gy: &Self::Array,
        sizes: [usize; 3],
        gw: &mut Self::Array,
    ) -> Result<Self::Array>;
}

/// What a [`Guard`](Backend::Guard) measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GuardState {
    /// Norm of the gradients of the last step.
    pub norm: f64,
    /// Whether the last step was finite; if not, it changed no parameters.
    pub is_finite: bool,
    /// Number of steps that were not finite.
    pub num_skipped: u64,
}

/// Parameters that an update changes.
#[derive(Debug)]
pub struct Update<'a, B: Backend> {
    /// The parameters.
    pub values: &'a mut B::Array,
    /// Their copy in the type of the products.
    pub short: Option<&'a mut B::Array>,
    /// Their gradients.
    pub grads: &'a B::Array,
    /// What was measured of the step.
    pub guard: &'a B::Guard,
    /// Whether the guard's clipping factor scales the gradients.
    pub is_clipped: bool,
}

/// The margin loss of a batch.
#[derive(Debug)]
pub struct MarginLoss<B: Backend> {
    /// Mean cross-entropy of the rows with a label.
    pub loss: B::Scalar,
    /// Weighted gradient with respect to the embeddings, `(N, d)`.
    pub of_embeddings: B::Array,
    /// Cosine between each row and its class centre; any number for a row without a label.
    pub target_cosines: B::Array,
}
