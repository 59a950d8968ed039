//! The values of a forward pass that training keeps and recomputes.

use std::collections::BTreeMap;
use std::ops::Range;

use super::program::{Norm, Program, Step, View};

/// Values and gradients that a backward pass needs, and when it needs them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Schedule {
    /// By view: whether a trained parameter depends on its gradient.
    pub views: Vec<bool>,
    /// By value: the same.
    pub values: Vec<bool>,
    /// By value: the steps to recompute once its gradient is known, for the backward passes of the steps that come
    /// before it.
    pub again: BTreeMap<usize, Range<usize>>,
}

/// What is kept of a forward pass for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    /// Everything that it needs, except values that one pass over memory recomputes.
    Kept,
    /// Activation checkpointing: keep some block outputs and recompute the rest (Chen et al., 2016, "Training Deep Nets
    /// with Sublinear Memory Cost").
    Recomputed,
}

impl Schedule {
    /// Returns the schedule of a program. `shapes` are those of its values for any number of images, and `is_trained`
    /// tells which parameters are trained.
    pub fn new(
        program: &Program,
        shapes: &[[usize; 4]],
        is_trained: impl Fn(&str) -> bool,
        activations: Activations,
    ) -> Self {
        let (values, views) = needed(program, &is_trained);
        let used = used(program, &views, &is_trained);
        let last_uses = last_uses(program);
        let again: BTreeMap<usize, Range<usize>> = match activations {
            Activations::Kept => written(program, &used, &last_uses),
            Activations::Recomputed => {
                let segments = segments(program, shapes, &values).into_iter().filter(|s| s.len() > 1);
                segments.map(|s| (s.end, s.start..s.end - 1)).collect()
            }
        };
        Self { views, values, again }
    }
}

/// Returns, for each value and each view, whether a trained parameter depends on its gradient.
fn needed(program: &Program, is_trained: &dyn Fn(&str) -> bool) -> (Vec<bool>, Vec<bool>) {
    let has_trained = |names: Vec<String>| names.iter().any(|name| is_trained(name));
    let (mut values, mut views) = (Vec::new(), vec![false; program.views.len()]);
    for value in 0..=program.steps.len() {
        let step = value.checked_sub(1).map(|i| &program.steps[i]);
        let is_needed =
            step.is_some_and(|step| has_trained(step.param_names()) || step.inputs().iter().any(|view| views[*view]));
        values.push(is_needed);
        for (view, View { norm, .. }) in program.views.iter().enumerate().filter(|(_, v)| v.value == value) {
            views[view] = is_needed || norm.as_ref().is_some_and(|norm| has_trained(Norm::param_names(norm)));
        }
    }
    (values, views)
}

/// Returns, for each value, whether the backward pass reads it: for the norm that follows, for a convolution's filter,
/// a product, an activation or max pooling.
fn used(program: &Program, views: &[bool], is_trained: &dyn Fn(&str) -> bool) -> Vec<bool> {
    let mut used = vec![false; program.steps.len() + 1];
    for (View { value, norm }, is_needed) in program.views.iter().zip(views) {
        used[*value] |= norm.is_some() && *is_needed;
    }
    for (i, step) in program.steps.iter().enumerate() {
        match step {
            Step::Conv { x, .. } => {
                used[program.views[*x].value] |= step.param_names().iter().any(|name| is_trained(name));
            }
            Step::Scale { x, by, .. } => [x, by].into_iter().for_each(|view| used[program.views[*view].value] = true),
            Step::Activate { .. } => used[i + 1] = true,
            Step::MaxPool { x, .. } => used[program.views[*x].value] |= views[*x],
            _ => {}
        }
    }
    used
}

/// By value: the step to recompute once its gradient is known, for steps that are one pass over a value that is kept.
fn written(program: &Program, used: &[bool], last_uses: &[Option<usize>]) -> BTreeMap<usize, Range<usize>> {
    let mut again = BTreeMap::new();
    for (i, step) in program.steps.iter().enumerate() {
        if let (Step::Write { x }, true, Some(last)) = (step, used[i + 1], last_uses[i + 1])
            && used[program.views[*x].value]
        {
            again.entry(last + 1).or_insert(i..i + 1);
        }
    }
    again
}

/// Returns the last step that reads each value; `None` for an output, which is read after all steps.
fn last_uses(program: &Program) -> Vec<Option<usize>> {
    let mut last: Vec<Option<usize>> =
        (0..=program.steps.len()).map(|value| value.checked_sub(1).or(Some(0))).collect();
    for (i, step) in program.steps.iter().enumerate() {
        step.inputs().iter().for_each(|view| last[program.views[*view].value] = Some(i));
    }
    program.outputs.iter().for_each(|output| last[program.views[*output].value] = None);
    last
}

/// Returns the ranges of values whose ends are kept and whose inner values are recomputed, chosen for the lowest peak
/// memory of the backward pass. All values after the last range are kept.
fn segments(program: &Program, shapes: &[[usize; 4]], values: &[bool]) -> Vec<Range<usize>> {
    let cuts = cuts(program, values);
    let sizes: Vec<usize> = shapes.iter().map(|shape| shape.iter().product()).collect();
    let inside = |from: usize, to: usize| -> usize { sizes[from + 1..to].iter().sum() };
    // A gradient is alive together with that of the step before it, each as large as a value.
    let peak = |from: usize, to: usize| {
        let largest = sizes[from..(to + 1).min(sizes.len())].iter().max();
        inside(from, to) + 2 * largest.copied().unwrap_or(0)
    };
    // Returns the cuts that keep the least, of those whose peak stays within `limit`, if there are any.
    let choose = |limit: usize| -> Option<Vec<usize>> {
        let mut best: Vec<Option<(usize, usize)>> = vec![None; cuts.len()];
        best[0] = Some((sizes[cuts[0]], 0));
        for j in 1..cuts.len() {
            let kept = |i: usize| {
                let (before, _): (usize, usize) = best[i]?;
                let here = before + sizes[cuts[j]];
                (before + peak(cuts[i], cuts[j]) + sizes[cuts[j]] <= limit).then_some((here, i))
            };
            best[j] = (0..j).filter_map(kept).min();
        }
        let of_end = |i: usize| Some((best[i]?.0 + peak(cuts[i], sizes.len()), i));
        let (total, mut at) = (0..cuts.len()).filter_map(of_end).min()?;
        if total > limit {
            return None;
        }
        let mut chosen = vec![cuts[at]];
        while at > 0 {
            at = best[at]?.1;
            chosen.push(cuts[at]);
        }
        chosen.reverse();
        Some(chosen)
    };
    let (mut low, mut high) = (0, 4 * sizes.iter().sum::<usize>());
    while low < high {
        let middle = low + (high - low) / 2;
        if choose(middle).is_some() { high = middle } else { low = middle + 1 }
    }
    choose(high).map_or(Vec::new(), |chosen| chosen.windows(2).map(|w| w[0]..w[1]).collect())
}

/// Returns the values that everything after them is computed from, in order, starting with the last one that has
/// nothing trained before it. None lies after a fully connected step, because its dropout mask is not drawn again.
fn cuts(program: &Program, values: &[bool]) -> Vec<usize> {
    let is_linear = |step: &Step| matches!(step, Step::Linear { .. });
    let end = program.steps.iter().position(is_linear).unwrap_or(program.steps.len());
    let (mut cuts, mut least) = (Vec::new(), usize::MAX);
    for (i, step) in program.steps.iter().enumerate().rev() {
        step.inputs().iter().for_each(|view| least = least.min(program.views[*view].value));
        if least >= i && i <= end {
            cuts.push(i);
        }
    }
    cuts.reverse();
    let first = cuts.iter().rposition(|cut| !values[*cut]).unwrap_or(0);
    cuts.split_off(first)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::nn::graph::{Graph, Op};
    use crate::ops::conv::ConvConfig;

    /// A stem with norm and PReLU, then blocks of norm, convolution, norm with PReLU, convolution and sum, every second
    /// one with squeeze-excitation, in four stages that halve the sides.
    fn chain(num_blocks: usize) -> Graph {
        let mut graph = Graph::new();
        let conv = |stride| Op::Conv2d(ConvConfig { stride, padding: 1, groups: 1 });
        let mut x = graph.push(conv(1), "stem", &[Graph::INPUT]);
        x = graph.push(Op::BatchNorm, "stem.norm", &[x]);
        x = graph.push(Op::PRelu, "stem.act", &[x]);
        for i in 0..num_blocks {
            let stride = if i > 0 && i % (num_blocks / 4) == 0 { 2 } else { 1 };
            let y = graph.push(Op::BatchNorm, &format!("{i}.pre"), &[x]);
            let y = graph.push(conv(1), &format!("{i}.a"), &[y]);
            let y = graph.push(Op::BatchNorm, &format!("{i}.norm"), &[y]);
            let y = graph.push(Op::PRelu, &format!("{i}.act"), &[y]);
            let mut y = graph.push(conv(stride), &format!("{i}.b"), &[y]);
            if i % 2 == 1 {
                let full = Op::Conv2d(ConvConfig::default());
                let mean = graph.push(Op::GlobalAveragePool, "", &[y]);
                let hidden = graph.push(full.clone(), &format!("{i}.fc1"), &[mean]);
                let hidden = graph.push(Op::Relu, "", &[hidden]);
                let scale = graph.push(full, &format!("{i}.fc2"), &[hidden]);
                let scale = graph.push(Op::Sigmoid, "", &[scale]);
                y = graph.push(Op::Mul, "", &[y, scale]);
            }
            let short = if stride == 2 { graph.push(conv(2), &format!("{i}.short"), &[x]) } else { x };
            x = graph.push(Op::Add, "", &[y, short]);
        }
        let x = graph.push(Op::Flatten, "", &[x]);
        let x = graph.push(Op::Linear { has_bias: true }, "fc", &[x]);
        graph.push(Op::BatchNorm, "last", &[x]);
        graph
    }

    /// The program of a [`chain`], and the shapes of its values.
    pub fn program(num_blocks: usize) -> (Program, Vec<[usize; 4]>) {
        let program = Program::of(&chain(num_blocks)).expect("all operations are known");
        let side = 64 >> 3;
        let shape = |name: String| {
            let shape = match name.as_str() {
                "stem.weight" => vec![16, 3, 3, 3],
                name if name.contains(".fc") => vec![16, 16, 1, 1],
                "fc.weight" => vec![8, 16 * side * side],
                _ => vec![16, 16, 3, 3],
            };
            (name, shape)
        };
        let shapes = program.shapes(&program.param_names().into_iter().map(shape).collect(), [1, 64, 64, 3]);
        (program, shapes.expect("they fit each other"))
    }
}
