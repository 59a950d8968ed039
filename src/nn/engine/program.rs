//! A network as steps over activations and views of them.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::nn::graph::{Graph, Node, NodeId, Op};
use crate::ops::backend::{ConvShape, Kernels};
use crate::ops::conv::{ConvConfig, output_shape};

/// Index of a [`View`].
pub(super) type ViewId = usize;

/// The steps of a network. Value 0 is the images, value `i + 1` the result of step `i`.
#[derive(Clone, Debug, Default)]
pub(super) struct Program {
    pub steps: Vec<Step>,
    pub views: Vec<View>,
    pub output: ViewId,
}

/// A computation on views.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    /// Convolution with parameter `weight` under the path.
    Conv { x: ViewId, path: String, config: ConvConfig },
    /// Sum of two views.
    Add { a: ViewId, b: ViewId },
    /// Writes a view, with its norm applied, as a new value.
    Write { x: ViewId },
    /// Fully connected layer with parameters `weight` and optionally `bias`; the input is flattened in the order
    /// channels, rows, columns. With `drops`, dropout acts on it in training.
    Linear { x: ViewId, path: String, has_bias: bool, drops: bool },
}

impl Step {
    /// Views that the step reads.
    pub fn inputs(&self) -> Vec<ViewId> {
        match self {
            Self::Conv { x, .. } | Self::Write { x } | Self::Linear { x, .. } => vec![*x],
            Self::Add { a, b } => vec![*a, *b],
        }
    }

    /// Names of the step's parameters.
    pub fn param_names(&self) -> Vec<String> {
        match self {
            Self::Conv { path, .. } => vec![format!("{path}.weight")],
            Self::Linear { path, has_bias: true, .. } => vec![format!("{path}.weight"), format!("{path}.bias")],
            Self::Linear { path, .. } => vec![format!("{path}.weight")],
            Self::Add { .. } | Self::Write { .. } => Vec::new(),
        }
    }
}

/// A value as it is (raw), or after its norm.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    pub value: usize,
    pub norm: Option<Norm>,
}

/// Batch norm, followed by PReLU if there is one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Norm {
    /// Path of the batch norm's parameters and statistics.
    pub bn: String,
    /// Path of the PReLU's slopes.
    pub prelu: Option<String>,
}

impl Norm {
    /// Names of the norm's parameters.
    pub fn param_names(&self) -> Vec<String> {
        let slope = self.prelu.as_ref().map(|prelu| format!("{prelu}.weight"));
        [format!("{}.weight", self.bn), format!("{}.bias", self.bn)].into_iter().chain(slope).collect()
    }
}

impl Program {
    /// Returns the steps of a network; `None` if it has an operation that the engine does not support.
    pub fn of(graph: &Graph) -> Option<Self> {
        let mut uses: HashMap<NodeId, usize> = HashMap::new();
        for node in graph.nodes() {
            node.inputs.iter().for_each(|input| *uses.entry(*input).or_default() += 1);
        }
        let mut program = Self::default();
        // View of each node's result.
        let mut shown: Vec<ViewId> = Vec::new();
        for node in graph.nodes() {
            let input = |i: usize| node.inputs.get(i).map(|node| shown[*node]);
            let path = node.path.clone();
            let view = match &node.op {
                Op::Input => program.view(0, None),
                Op::Conv2d(config) => {
                    let (x, config) = (input(0)?, *config);
                    program.push(Step::Conv { x, path, config })
                }
                Op::Linear { has_bias } => {
                    let (x, has_bias) = (input(0)?, *has_bias);
                    let drops = graph.nodes()[node.inputs[0]].op == Op::Dropout;
                    program.push(Step::Linear { x, path, has_bias, drops })
                }
                Op::Add => program.push(Step::Add { a: input(0)?, b: input(1)? }),
                Op::BatchNorm => {
                    let mut x = input(0)?;
                    if program.views[x].norm.is_some() {
                        // A norm of a norm: the first is written out, and later nodes read the result.
                        let written = program.push(Step::Write { x });
                        shown[node.inputs[0]] = written;
                        x = written;
                    }
                    let value = program.views[x].value;
                    if value == 0 || program.norm_of(value).is_some() {
                        return None;
                    }
                    program.view(value, Some(Norm { bn: path, prelu: None }))
                }
                Op::PRelu => {
                    let x = input(0)?;
                    let norm = program.views[x].norm.as_mut()?;
                    if norm.prelu.is_some() || uses[&node.inputs[0]] > 1 {
                        return None;
                    }
                    norm.prelu = Some(path);
                    x
                }
                Op::Flatten => input(0)?,
                Op::Dropout => {
                    let is_linear = |reader: &&Node| matches!(reader.op, Op::Linear { .. });
                    let mut readers = graph.nodes().iter().filter(|reader| reader.inputs.contains(&shown.len()));
                    if !readers.all(|reader| is_linear(&reader)) {
                        return None;
                    }
                    input(0)?
                }
                Op::Mul | Op::GlobalAveragePool | Op::Relu | Op::Sigmoid => return None,
            };
            shown.push(view);
        }
        program.output = *shown.last()?;
        Some(program)
    }

    fn view(&mut self, value: usize, norm: Option<Norm>) -> ViewId {
        self.views.push(View { value, norm });
        self.views.len() - 1
    }

    /// Appends a step; returns the raw view of its result.
    fn push(&mut self, step: Step) -> ViewId {
        self.steps.push(step);
        self.view(self.steps.len(), None)
    }

    /// Returns the raw view of a value.
    pub fn raw_of(&self, value: usize) -> Option<ViewId> {
        self.views.iter().position(|view| view.value == value && view.norm.is_none())
    }

    /// Returns the view of a value after its norm, if it has one.
    pub fn norm_of(&self, value: usize) -> Option<ViewId> {
        self.views.iter().position(|view| view.value == value && view.norm.is_some())
    }

    /// Returns the shapes `(n, h, w, c)` of all values from those of the weights by name; `None` if they do not match.
    pub fn shapes(&self, weights: &BTreeMap<String, Vec<usize>>, images: [usize; 4]) -> Option<Vec<[usize; 4]>> {
        let weight = |path: &str| weights.get(&format!("{path}.weight")).map(Vec::as_slice);
        let mut shapes = vec![images];
        for step in &self.steps {
            let of = |view: ViewId| shapes[self.views[view].value];
            shapes.push(match step {
                Step::Conv { x, path, config } => output_shape(of(*x), weight(path)?.try_into().ok()?, *config)?,
                Step::Add { a, b } if of(*a) == of(*b) => of(*a),
                Step::Add { .. } => return None,
                Step::Write { x } => of(*x),
                Step::Linear { x, path, .. } => {
                    let ([outputs, inputs], [n, rest @ ..]) = (weight(path)?.try_into().ok()?, of(*x));
                    if rest.iter().product::<usize>() != inputs {
                        return None;
                    }
                    [n, 1, 1, outputs]
                }
            });
        }
        Some(shapes)
    }

    /// Returns the convolution of each step that is one, from the shapes of the values.
    pub fn convs(
        &self,
        weights: &BTreeMap<String, Vec<usize>>,
        shapes: &[[usize; 4]],
    ) -> Option<BTreeMap<usize, ConvShape>> {
        let mut convs = BTreeMap::new();
        for (i, step) in self.steps.iter().enumerate() {
            let Step::Conv { x, path, config } = step else { continue };
            let w = weights.get(&format!("{path}.weight"))?.as_slice().try_into().ok()?;
            convs.insert(i, ConvShape { x: shapes[self.views[*x].value], w, config: *config });
        }
        Some(convs)
    }

    /// Whether a device has kernels for these convolutions and values.
    pub fn runs_on(&self, backend: &impl Kernels, convs: &BTreeMap<usize, ConvShape>, shapes: &[[usize; 4]]) -> bool {
        let is_raw = |i: &usize| match &self.steps[*i] {
            Step::Conv { x, .. } => self.views[*x] == View { value: 0, norm: None },
            _ => false,
        };
        let has_channels = shapes[1..].iter().all(|[.., c]| backend.supports_channels(*c));
        has_channels && convs.iter().all(|(i, conv)| backend.supports_conv(conv, is_raw(i)))
    }

    /// Whether a value follows a fully connected step.
    pub fn is_wide(&self, value: usize) -> bool {
        match value.checked_sub(1).map(|i| &self.steps[i]) {
            None => false,
            Some(Step::Linear { .. }) => true,
            Some(step) => self.is_wide(self.views[step.inputs()[0]].value),
        }
    }

    /// Names of all parameters.
    pub fn param_names(&self) -> HashSet<String> {
        let of_steps = self.steps.iter().flat_map(Step::param_names);
        let of_norms = self.views.iter().filter_map(|view| view.norm.as_ref()).flat_map(Norm::param_names);
        of_steps.chain(of_norms).collect()
    }

    /// Returns how often each view is read; the output counts once more.
    pub fn num_uses(&self) -> Vec<usize> {
        let mut uses = vec![0; self.views.len()];
        self.steps.iter().flat_map(Step::inputs).chain([self.output]).for_each(|view| uses[view] += 1);
        uses
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_are_views_and_a_norm_of_a_norm_is_written_once() {
        let (mut graph, conv) = (Graph::new(), Op::Conv2d(ConvConfig::default()));
        let x = graph.push(conv.clone(), "a", &[Graph::INPUT]);
        let x = graph.push(Op::BatchNorm, "b", &[x]);
        let x = graph.push(Op::PRelu, "c", &[x]);
        let y = graph.push(Op::BatchNorm, "d", &[x]);
        let y = graph.push(conv, "e", &[y]);
        let y = graph.push(Op::BatchNorm, "f", &[y]);
        graph.push(Op::Add, "", &[y, x]);
        let program = Program::of(&graph).expect("all operations are known");
        let is_conv = |step: &Step, name: &str| matches!(step, Step::Conv { path, .. } if path == name);
        assert!(is_conv(&program.steps[0], "a") && is_conv(&program.steps[2], "e"));
        let Step::Write { x } = program.steps[1] else { panic!("{:?}", program.steps) };
        assert_eq!(program.views[x].norm, Some(Norm { bn: "b".into(), prelu: Some("c".into()) }));
        let Step::Add { a, b } = program.steps[3] else { panic!("{:?}", program.steps) };
        assert_eq!(program.views[a], View { value: 3, norm: Some(Norm { bn: "f".into(), prelu: None }) });
        assert_eq!(program.views[b], View { value: 2, norm: None }, "the written value, not the norm again");
        assert_eq!((program.steps.len(), program.raw_of(2), program.norm_of(4)), (4, Some(b), None));
    }

    #[test]
    fn operations_that_the_engine_lacks_leave_no_program() {
        let mut graph = Graph::new();
        graph.push(Op::Sigmoid, "", &[Graph::INPUT]);
        assert!(Program::of(&graph).is_none());
    }
}
