//! A pass as a list of tasks on buffers, whose lifetimes are known ahead.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Result, bail};

use super::fold::Folding;
use super::program::{Program, Step, ViewId};
use super::schedule::Schedule;
use crate::ops::backend::{Buffer, BufferId, MapGrad, MemoryLayout, NormGrad};

/// A step of the program with the buffers that it reads and writes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Forward {
    /// Index of the step.
    pub i: usize,
    /// Buffers of the values that its views show.
    pub inputs: Vec<BufferId>,
    /// What a convolution adds to its result.
    pub residual: Option<BufferId>,
    /// Buffer for a fully connected step's input, flattened in the order channels, rows, columns.
    pub flat: Option<BufferId>,
    pub y: BufferId,
}

/// A task of the backward pass.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Task {
    /// Recomputes a step of the forward pass.
    Again(Forward),
    /// Gradients of a norm. `gy` is the gradient of the view after the norm, `direct` that of the raw value; the
    /// value's own gradient overwrites the value in `x`.
    Norm { view: ViewId, grad: NormGrad },
    /// The gradient of a convolution's filter.
    Filter { i: usize, x: BufferId, gy: BufferId },
    /// Gradient of a convolution's input, plus `other`, the gradient from the input's other uses so far.
    Input { i: usize, gy: BufferId, other: Option<BufferId>, gx: BufferId },
    /// Gradients of a fully connected step. With `gx`, the gradient of its input too, which overwrites the flattened
    /// input.
    Linear { i: usize, flat: BufferId, gy: BufferId, gx: Option<BufferId> },
    /// Gradient of the input of a mean over pixels.
    Spread { i: usize, grad: MapGrad },
    /// Gradient of a product's first side.
    Scale { i: usize, by: BufferId, grad: MapGrad },
    /// Gradient of a product's factors.
    Factors { i: usize, x: BufferId, gy: BufferId, gs: BufferId },
    /// Gradient of an activation's input from its result.
    Activate { i: usize, y: BufferId, gy: BufferId, gx: BufferId },
    /// Gradient of max pooling's input.
    MaxPool { i: usize, x: BufferId, grad: MapGrad },
    /// Gradient of the input of upsampling.
    Upsample { i: usize, grad: MapGrad },
    /// Gradient of a part of a concatenation.
    Part { i: usize, part: usize, grad: MapGrad },
    /// The sum of two gradients of a view.
    Sum { view: ViewId, a: BufferId, b: BufferId, y: BufferId },
}

impl Forward {
    fn read(&self) -> Vec<BufferId> {
        self.inputs.iter().copied().chain(self.residual).collect()
    }

    fn written(&self) -> Vec<BufferId> {
        self.flat.into_iter().chain([self.y]).collect()
    }
}

impl Task {
    fn read(&self) -> Vec<BufferId> {
        match self {
            Self::Again(forward) => forward.read(),
            Self::Norm { grad: NormGrad { x, gy, direct }, .. } => [*x, *gy].into_iter().chain(*direct).collect(),
            Self::Filter { x, gy, .. } => vec![*x, *gy],
            Self::Input { gy, other, .. } => [*gy].into_iter().chain(*other).collect(),
            Self::Linear { flat, gy, .. } => vec![*flat, *gy],
            Self::Spread { grad, .. } | Self::Upsample { grad, .. } | Self::Part { grad, .. } => grad.read().collect(),
            Self::Scale { by: value, grad, .. } | Self::MaxPool { x: value, grad, .. } => {
                grad.read().chain([*value]).collect()
            }
            Self::Factors { x, gy, .. } => vec![*x, *gy],
            Self::Activate { y, gy, .. } => vec![*y, *gy],
            Self::Sum { a, b, .. } => vec![*a, *b],
        }
    }

    fn written(&self) -> Vec<BufferId> {
        match self {
            Self::Again(forward) => forward.written(),
            Self::Norm { grad, .. } => vec![grad.x],
            Self::Filter { .. } => vec![],
            Self::Input { gx, .. } | Self::Activate { gx, .. } => vec![*gx],
            Self::Spread { grad, .. } | Self::Scale { grad, .. } | Self::MaxPool { grad, .. } => vec![grad.gx],
            Self::Upsample { grad, .. } | Self::Part { grad, .. } => vec![grad.gx],
            Self::Factors { gs, .. } => vec![*gs],
            Self::Linear { flat, gx, .. } => [*flat].into_iter().chain(*gx).collect(),
            Self::Sum { y, .. } => vec![*y],
        }
    }
}

/// The tasks of a forward and a backward pass. Its moments are, in order: loading the images, each task of the forward
/// pass, reading the outputs, setting the gradient, each task of the backward pass.
#[derive(Clone, Debug)]
pub(super) struct Tape {
    pub forward: Vec<Forward>,
    pub backward: Vec<Task>,
    /// Buffer of the images, which the forward pass starts from.
    pub images: BufferId,
    /// Buffers of the outputs' values, which the forward pass ends with.
    pub outputs: Vec<BufferId>,
    /// Buffer of the gradient of the output's view, which the backward pass starts from.
    pub gradient: BufferId,
    pub layout: Arc<MemoryLayout>,
}

impl Tape {
    /// Returns the tape of training. `shapes` are those of the program's values for one image, and `is_trained` tells
    /// which parameters are trained.
    ///
    /// # Errors
    /// When a step that trained parameters depend on gets no gradient.
    pub fn new(
        program: &Program,
        shapes: &[[usize; 4]],
        schedule: &Schedule,
        is_trained: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let mut writer = Writer::new(program, shapes);
        let images = writer.shown(0);
        let forward: Vec<Forward> = (0..program.steps.len()).map(|i| writer.step(i)).collect();
        let [view] = program.outputs[..] else {
            bail!("expected one output to train, found {}", program.outputs.len());
        };
        let output = writer.shown(view);
        let gradient = writer.gradient(view);
        for i in (0..program.steps.len()).rev() {
            writer.step_backward(i, schedule, &is_trained)?;
        }
        let Writer { buffers, tasks: backward, .. } = writer;
        Ok(Self::laid_out(forward, backward, images, (vec![output], gradient), buffers))
    }

    /// Returns the tape of inference. Values that are bytes take a quarter of the memory.
    pub fn inference(
        program: &Program,
        shapes: &[[usize; 4]],
        folding: &Folding,
        is_bytes: impl Fn(usize) -> bool,
    ) -> Self {
        let mut writer = Writer::new(program, shapes);
        for (value, (size, _)) in writer.values_of.iter_mut().enumerate().filter(|(value, _)| is_bytes(*value)) {
            *size = size.div_ceil(4);
            debug_assert!(value > 0, "the images are floats");
        }
        let images = writer.shown(0);
        let is_moved = |i: usize| folding.sums.values().any(|(conv, _)| *conv == i);
        let mut forward = Vec::new();
        for i in (0..program.steps.len()).filter(|i| !is_moved(*i)) {
            let mut step = writer.step(i);
            if let Some((conv, other)) = folding.sums.get(&i) {
                let inputs = program.steps[*conv].inputs().iter().map(|view| writer.shown(*view)).collect();
                step = Forward { i: *conv, inputs, residual: Some(writer.shown(*other)), ..step };
            }
            forward.push(step);
        }
        let outputs: Vec<BufferId> = program.outputs.iter().map(|output| writer.shown(*output)).collect();
        let gradient = outputs[0];
        Self::laid_out(forward, Vec::new(), images, (outputs, gradient), writer.buffers)
    }

    fn laid_out(
        forward: Vec<Forward>,
        backward: Vec<Task>,
        images: BufferId,
        (outputs, gradient): (Vec<BufferId>, BufferId),
        mut buffers: Vec<Buffer>,
    ) -> Self {
        let of_forward = forward.iter().map(|forward| [forward.read(), forward.written()].concat());
        let of_backward = backward.iter().map(|task| [task.read(), task.written()].concat());
        let moments = [vec![images]].into_iter().chain(of_forward);
        let moments = moments.chain([outputs.clone(), vec![gradient]]).chain(of_backward);
        for (moment, used) in moments.enumerate() {
            for buffer in used {
                let alive = &mut buffers[buffer].alive;
                *alive = if alive.end == 0 { moment } else { alive.start }..moment + 1;
            }
        }
        Self { forward, backward, images, outputs, gradient, layout: Arc::new(MemoryLayout::new(buffers)) }
    }
}

struct Writer<'a> {
    program: &'a Program,
    /// Elements of each value for one image, and whether they are f32.
    values_of: Vec<(usize, bool)>,
    buffers: Vec<Buffer>,
    /// Current buffer of each value.
    values: BTreeMap<usize, BufferId>,
    /// Buffers of the flattened inputs of fully connected steps, by step.
    flat: BTreeMap<usize, BufferId>,
    /// Buffer of the gradient of each view, as far as it is known.
    grads: Vec<Option<BufferId>>,
    tasks: Vec<Task>,
}

impl<'a> Writer<'a> {
    fn new(program: &'a Program, shapes: &[[usize; 4]]) -> Self {
        let values = shapes.iter().enumerate();
        let values_of = values.map(|(value, shape)| (shape[1..].iter().product(), program.is_wide(value))).collect();
        let mut writer = Self {
            program,
            values_of,
            buffers: Vec::new(),
            values: BTreeMap::new(),
            flat: BTreeMap::new(),
            grads: vec![None; program.views.len()],
            tasks: Vec::new(),
        };
        let images = writer.buffer(0);
        writer.values.insert(0, images);
        writer
    }

    /// Creates a buffer for a value or its gradient.
    fn buffer(&mut self, value: usize) -> BufferId {
        let (size, is_wide) = self.values_of[value];
        self.buffers.push(Buffer { size, is_wide, alive: 0..0 });
        self.buffers.len() - 1
    }

    fn shown(&self, view: ViewId) -> BufferId {
        self.values[&self.program.views[view].value]
    }

    /// Creates the buffer for the gradient of a view and records it.
    fn gradient(&mut self, view: ViewId) -> BufferId {
        let buffer = self.buffer(self.program.views[view].value);
        self.grads[view] = Some(buffer);
        buffer
    }

    /// Returns the task of step `i`, with new buffers: for its first run or to recompute it.
    fn step(&mut self, i: usize) -> Forward {
        let step = &self.program.steps[i];
        // What a convolution of inference that has moved computes is not shown yet.
        let shown = |view: &ViewId| self.values.get(&self.program.views[*view].value).copied();
        let inputs: Vec<BufferId> = step.inputs().iter().filter_map(shown).collect();
        let flat = match step {
            Step::Linear { x, .. } => {
                let (size, _) = self.values_of[self.program.views[*x].value];
                self.buffers.push(Buffer { size, is_wide: false, alive: 0..0 });
                self.flat.insert(i, self.buffers.len() - 1);
                Some(self.buffers.len() - 1)
            }
            _ => None,
        };
        let y = self.buffer(i + 1);
        self.values.insert(i + 1, y);
        Forward { i, inputs, residual: None, flat, y }
    }

    fn step_backward(&mut self, i: usize, schedule: &Schedule, is_trained: &dyn Fn(&str) -> bool) -> Result<()> {
        let gy = self.norm_backward(i + 1);
        if !schedule.values[i + 1] {
            // No trained parameter takes part in computing it.
            return Ok(());
        }
        let Some(gy) = gy else { bail!("the result of {:?} gets no gradient", self.program.steps[i]) };
        for again in schedule.again.get(&(i + 1)).into_iter().flat_map(Clone::clone) {
            let forward = self.step(again);
            self.tasks.push(Task::Again(forward));
        }
        let step = &self.program.steps[i];
        match step {
            Step::Conv { x, .. } => {
                if step.param_names().iter().any(|name| is_trained(name)) {
                    self.tasks.push(Task::Filter { i, x: self.shown(*x), gy });
                }
                if schedule.views[*x] {
                    let other = self.grads[*x];
                    let gx = self.gradient(*x);
                    self.tasks.push(Task::Input { i, gy, other, gx });
                }
            }
            Step::Add { a, b } => [a, b].into_iter().for_each(|view| self.hand_on(*view, gy, schedule)),
            Step::Write { x } => self.hand_on(*x, gy, schedule),
            Step::Mean { .. } | Step::Scale { .. } | Step::Activate { .. } => self.pointwise_backward(i, gy, schedule),
            Step::MaxPool { .. } | Step::Upsample { .. } | Step::Concat { .. } => self.map_backward(i, gy, schedule),
            Step::Linear { x, .. } => {
                let gx = schedule.views[*x].then(|| self.buffer(self.program.views[*x].value));
                self.tasks.push(Task::Linear { i, flat: self.flat[&i], gy, gx });
                if let Some(gx) = gx {
                    self.hand_on(*x, gx, schedule);
                }
            }
        }
        Ok(())
    }

    /// Backward pass of means, products and activations.
    fn pointwise_backward(&mut self, i: usize, gy: BufferId, schedule: &Schedule) {
        match self.program.steps[i] {
            Step::Mean { x } if schedule.views[x] => {
                let grad = self.map_grad(x, gy);
                self.tasks.push(Task::Spread { i, grad });
            }
            Step::Scale { x, by, plus } => {
                plus.into_iter().for_each(|plus| self.hand_on(plus, gy, schedule));
                if schedule.views[by] {
                    let (x, gs) = (self.shown(x), self.buffer(self.program.views[by].value));
                    self.tasks.push(Task::Factors { i, x, gy, gs });
                    self.hand_on(by, gs, schedule);
                }
                if schedule.views[x] {
                    let (by, grad) = (self.shown(by), self.map_grad(x, gy));
                    self.tasks.push(Task::Scale { i, by, grad });
                }
            }
            Step::Activate { x, .. } if schedule.views[x] => {
                let (y, gx) = (self.values[&(i + 1)], self.buffer(self.program.views[x].value));
                self.tasks.push(Task::Activate { i, y, gy, gx });
                self.hand_on(x, gx, schedule);
            }
            _ => {}
        }
    }

    /// Backward pass of max pooling, upsampling and concatenation.
    fn map_backward(&mut self, i: usize, gy: BufferId, schedule: &Schedule) {
        let step = &self.program.steps[i];
        for (part, x) in step.inputs().into_iter().enumerate().filter(|(_, x)| schedule.views[*x]) {
            let (value, grad) = (self.shown(x), self.map_grad(x, gy));
            self.tasks.push(match step {
                Step::MaxPool { .. } => Task::MaxPool { i, x: value, grad },
                Step::Upsample { .. } => Task::Upsample { i, grad },
                _ => Task::Part { i, part, grad },
            });
        }
    }

    /// Creates the buffer for the gradient of a view, which adds to what reached the view before.
    fn map_grad(&mut self, view: ViewId, gy: BufferId) -> MapGrad {
        let other = self.grads[view];
        MapGrad { gy, other, gx: self.gradient(view) }
    }

    /// Returns the buffer of a raw value's gradient: the sum of what reached it directly and through its norm.
    fn norm_backward(&mut self, value: usize) -> Option<BufferId> {
        let direct = self.program.raw_of(value).and_then(|view| self.grads[view]);
        let normed = self.program.norm_of(value).and_then(|view| Some((view, self.grads[view]?)));
        let Some((view, gy)) = normed else { return direct };
        let x = self.values[&value];
        self.tasks.push(Task::Norm { view, grad: NormGrad { x, gy, direct } });
        Some(x)
    }

    /// Adds `gy` to the gradient of a view. Finished gradients are never overwritten, because both sides of a sum share
    /// one.
    fn hand_on(&mut self, view: ViewId, gy: BufferId, schedule: &Schedule) {
        if !schedule.views[view] {
            return;
        }
        match self.grads[view] {
            None => self.grads[view] = Some(gy),
            Some(old) => {
                let y = self.gradient(view);
                self.tasks.push(Task::Sum { view, a: old, b: gy, y });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::nn::engine::Activations;
    use crate::nn::engine::schedule::tests::program;

    fn tape(num_blocks: usize, is_trained: &dyn Fn(&str) -> bool, activations: Activations) -> Tape {
        let (program, shapes) = program(num_blocks);
        let schedule = Schedule::new(&program, &shapes, is_trained, activations);
        Tape::new(&program, &shapes, &schedule, is_trained).expect("all steps have gradients")
    }

    /// Elements of the block for each image.
    fn of_image(tape: &Tape) -> usize {
        tape.layout.len(2) - tape.layout.len(1)
    }

    /// The elements of a block, and the buffer whose contents each one holds.
    struct Block<'a>(&'a Tape, Vec<Option<BufferId>>);

    impl Block<'_> {
        fn read(&self, buffers: &[BufferId], what: &dyn std::fmt::Debug) {
            for &buffer in buffers {
                assert!(
                    self.1[self.0.layout.place(buffer, 1)].iter().all(|of| *of == Some(buffer)),
                    "{buffer} is lost: {what:?}"
                );
            }
        }

        fn write(&mut self, buffers: &[BufferId]) {
            for &buffer in buffers {
                self.1[self.0.layout.place(buffer, 1)].fill(Some(buffer));
            }
        }
    }

    /// The values of the forward pass that a task reads.
    fn values(task: &Task) -> Vec<BufferId> {
        match task {
            Task::Again(forward) => forward.read(),
            Task::Norm { grad, .. } => vec![grad.x],
            Task::Filter { x, .. } | Task::Factors { x, .. } | Task::MaxPool { x, .. } => vec![*x],
            Task::Scale { by, .. } => vec![*by],
            Task::Activate { y, .. } => vec![*y],
            Task::Linear { flat, .. } => vec![*flat],
            Task::Input { .. } | Task::Spread { .. } | Task::Upsample { .. } | Task::Part { .. } | Task::Sum { .. } => {
                Vec::new()
            }
        }
    }

    #[test]
    fn what_is_read_is_what_was_written_there() {
        for frozen in [&[][..], &["stem", "0.", "1."], &["3.", "5.b", "7.norm", "fc"]] {
            let is_trained = |name: &str| !frozen.iter().any(|prefix| name.starts_with(prefix));
            for activations in [Activations::Kept, Activations::Recomputed] {
                let tape = tape(12, &is_trained, activations);
                let mut block = Block(&tape, vec![None; tape.layout.len(1)]);
                block.write(&[tape.images]);
                for forward in &tape.forward {
                    block.read(&forward.read(), forward);
                    block.write(&forward.written());
                    // It is read again: for its statistics, or by the second part of a fully connected step.
                    block.read(&forward.written(), forward);
                }
                block.read(&tape.outputs, &"output");
                block.write(&[tape.gradient]);
                // Values that their own gradients have overwritten.
                let mut overwritten = BTreeSet::new();
                for task in &tape.backward {
                    block.read(&task.read(), task);
                    assert!(values(task).iter().all(|value| !overwritten.contains(value)), "a gradient: {task:?}");
                    if let Task::Norm { grad, .. } = task {
                        overwritten.insert(grad.x);
                    }
                    block.write(&task.written());
                    block.read(&task.written(), task);
                }
                let filters = tape.backward.iter().filter(|task| matches!(task, Task::Filter { .. })).count();
                let num_frozen = frozen.len();
                assert!(filters > 0 && (num_frozen > 0 || filters == 1 + 12 * 2 + 3 + 6 * 2), "{filters}");
            }
        }
    }

    #[test]
    fn the_block_is_no_longer_than_what_is_alive_at_once() {
        for (num_blocks, activations) in
            [4, 12, 48].into_iter().flat_map(|num| [(num, Activations::Kept), (num, Activations::Recomputed)])
        {
            let tape = tape(num_blocks, &|_| true, activations);
            assert_eq!(of_image(&tape), tape.layout.least(), "{num_blocks} blocks, {activations:?}");
        }
    }

    #[test]
    fn computing_again_takes_less_memory_the_deeper_the_network() {
        for (num_blocks, most) in [(4, 1.0), (16, 0.6), (48, 0.4)] {
            let of = |activations| of_image(&tape(num_blocks, &|_| true, activations)) as f64;
            let share = of(Activations::Recomputed) / of(Activations::Kept);
            assert!(share <= most, "{num_blocks} blocks: {share}");
        }
    }

    #[test]
    fn nothing_is_kept_of_what_is_before_the_first_trained_step() {
        let is_last = |name: &str| name.starts_with("fc") || name.starts_with("last");
        for activations in [Activations::Kept, Activations::Recomputed] {
            let tape = tape(8, &is_last, activations);
            // At most a block's input, the results of its two convolutions, and its factors.
            assert!(of_image(&tape) <= 3 * (64 * 64 + 1) * 16, "{}", of_image(&tape));
            let is_linear = |task: &Task| matches!(task, Task::Linear { gx: None, .. });
            assert!(
                matches!(&tape.backward[..], [Task::Norm { .. }, linear] if is_linear(linear)),
                "{:?}",
                tape.backward
            );
        }
    }
}
