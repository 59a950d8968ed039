//! `report.html` of a training: the metrics of each arm, step by step.

use std::path::Path;

use maud::{Markup, PreEscaped, html};

use super::PAGE_FILE;
use super::axis::Scale;
use super::curve_plot::{Bucket, Curve, Plot, bucket_size, buckets, ends, legend};
use super::document::{address, document, provenance, short};
use super::figures::{FIGURES, Figure, LOSS};
use crate::error::{Error, Result};
use crate::eval::Setting;
use crate::files::write_atomic;
use crate::records::{EvaluationRecord, StepRecord};

/// Contents of the page of a training.
#[derive(Clone, Debug, Default)]
pub struct TrainingReport {
    /// Human-readable name of the training.
    pub title: String,
    /// Everything needed to reproduce the training: (name, value) rows.
    pub provenance: Vec<(String, String)>,
    /// Curves of each arm, in the order of their training.
    pub arms: Vec<ArmCurves>,
    /// Strips of images of one batch, from top to bottom: the teacher's, then the student's.
    pub samples: Vec<SampleRow>,
    /// Tables of results as the command line prints them; empty until there are results.
    pub tables: Vec<String>,
    /// Summary of the tables in words; may be empty.
    pub conclusion: String,
}

/// Metrics of one arm over its steps.
#[derive(Clone, Debug, Default)]
pub struct ArmCurves {
    /// The arm's name.
    pub name: String,
    /// Whether it distils from a teacher.
    pub distills: bool,
    /// Whether its training has finished.
    pub is_finished: bool,
    /// All steps, in order.
    pub steps: Vec<StepRecord>,
    /// All evaluations, in the order of their steps.
    pub evaluations: Vec<EvaluationRecord>,
    /// Notices and warnings for the user.
    pub notices: Vec<String>,
}

/// A strip of images of a training batch.
#[derive(Clone, Debug, Default)]
pub struct SampleRow {
    /// Network that sees the images.
    pub caption: String,
    /// The images as PNG files.
    pub images: Vec<Vec<u8>>,
}

impl TrainingReport {
    /// Writes the page into `folder`, which is created if missing. An older page is replaced, so that a running
    /// training can update it.
    ///
    /// # Errors
    /// When the folder cannot be written to or a curve cannot be drawn.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let page = self.page()?;
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        write_atomic(&folder.join(PAGE_FILE), page.as_bytes())
    }

    fn page(&self) -> Result<String> {
        let lead = html! { "Training as recorded by " code { "maskinv train" } ", step by step." };
        let body = html! {
            (self.curves()?)
            (self.samples())
            (self.results())
            (self.notices())
            (provenance("How this was trained", &self.provenance))
        };
        Ok(document("Training", &self.title, &lead, &body))
    }

    fn curves(&self) -> Result<Markup> {
        let mut plots = Vec::new();
        for figure in FIGURES {
            plots.extend(self.figure(figure)?);
        }
        for arm in &self.arms {
            plots.extend(self.error_rates(arm)?);
        }
        let steps_a_point = self.arms.iter().map(|arm| bucket_size(arm.steps.len())).max().unwrap_or(1);
        Ok(html! {
            section {
                h2 { "Curves" }
                @if self.arms.is_empty() { p { "Nothing has been trained yet." } } @else { div.scroll { (self.overview()) } }
                @if steps_a_point > 1 {
                    p.note { "Each point is the mean of up to " (steps_a_point) " steps; the band around it spans their minimum and maximum." }
                }
                div.plots.wide { @for plot in &plots { (plot) } }
            }
        })
    }

    /// Table of the progress of every arm.
    fn overview(&self) -> Markup {
        let last_loss = |arm: &ArmCurves| {
            let loss = arm.steps.iter().rev().find_map(|step| LOSS.of(step));
            loss.map_or(
                "-".to_owned(),
                |loss| if loss.abs() < 1e6 { format!("{loss:.4}") } else { format!("{loss:.3e}") },
            )
        };
        let num_epochs = |arm: &ArmCurves| arm.steps.last().map_or(0, |point| point.epoch.saturating_add(1));
        html! {
            table {
                thead { tr { th { "arm" } th { "state" } th { "steps" } th { "epochs" } th { "last loss" } } }
                tbody {
                    @for arm in &self.arms {
                        tr {
                            th { (arm.name) }
                            td { @if arm.is_finished { "finished" } @else { "not finished" } }
                            td { (arm.steps.len()) }
                            td { (num_epochs(arm)) }
                            td { (last_loss(arm)) }
                        }
                    }
                }
            }
        }
    }

    /// End of the step axis, the same for all plots so that they can be compared.
    fn last_step(&self) -> usize {
        let steps = self.arms.iter().flat_map(|arm| arm.steps.iter().map(|point| point.step));
        let evaluated = self.arms.iter().flat_map(|arm| arm.evaluations.iter().map(|point| point.step));
        steps.chain(evaluated).max().unwrap_or(0)
    }

    /// Plot of one metric, with a line for each arm that has it; `None` if no arm has it.
    fn figure(&self, figure: Figure) -> Result<Option<Markup>> {
        let Figure { title, is_magnitude, is_of_distillation, .. } = figure;
        let (mut curves, mut gaps) = (Vec::new(), Vec::new());
        for (colour, arm) in self.arms.iter().enumerate().filter(|(_, arm)| arm.distills || !is_of_distillation) {
            let points = buckets(&arm.steps, figure);
            if points.is_empty() {
                continue;
            }
            let num_missing = arm.steps.iter().filter(|step| figure.of(step).is_none()).count();
            if num_missing > 0 {
                gaps.push(format!("{num_missing} of {} of {}", arm.steps.len(), arm.name));
            }
            curves.push(Curve { name: &arm.name, colour, points });
        }
        let [low, high] = ends(&curves);
        // Not `high / low`, which may overflow.
        let is_log = is_magnitude && low > 0.0 && high / 10.0 > low;
        let scale = if is_log { Scale::Log } else { Scale::Linear };
        drawn(&Plot { title, scale, has_marks: false, last_step: self.last_step(), curves: &curves }, &gaps.join(", "))
    }

    /// Plot of an arm's error rates, with a line for each setting; `None` if the arm was not evaluated.
    fn error_rates(&self, arm: &ArmCurves) -> Result<Option<Markup>> {
        let mut curves: Vec<Curve> = Vec::new();
        for EvaluationRecord { step, evaluation, .. } in &arm.evaluations {
            let eer = |setting: Setting| Some((setting.name(), 100.0 * evaluation.settings.get(&setting)?.metrics.eer));
            let measured = Setting::TABLE.into_iter().filter_map(eer);
            for (name, eer) in measured.filter(|(_, eer)| eer.is_finite()) {
                let at = curves.iter().position(|curve| curve.name == name).unwrap_or_else(|| {
                    curves.push(Curve { name, colour: curves.len(), points: Vec::new() });
                    curves.len() - 1
                });
                curves[at].points.push(Bucket::of_one(*step, eer));
            }
        }
        let title = format!("{}: EER, %", short(&arm.name));
        let last_step = self.last_step();
        drawn(&Plot { title: &title, scale: Scale::Linear, has_marks: true, last_step, curves: &curves }, "")
    }

    fn samples(&self) -> Markup {
        html! {
            @if !self.samples.is_empty() {
                section {
                    h2 { "Inputs of the networks" }
                    div.scroll {
                        @for SampleRow { caption, images } in &self.samples {
                            figure {
                                figcaption { (caption) }
                                div.strip { @for image in images { img src=(address("image/png", image)) alt=(caption); } }
                            }
                        }
                    }
                }
            }
        }
    }

    fn results(&self) -> Markup {
        html! {
            section {
                h2 { "Results" }
                @for table in &self.tables { pre { (table) } }
                @if !self.conclusion.is_empty() { p.said { (self.conclusion) } }
                @if self.tables.is_empty() && self.conclusion.is_empty() { p { "None yet." } }
            }
        }
    }

    fn notices(&self) -> Markup {
        let num: usize = self.arms.iter().map(|arm| arm.notices.len()).sum();
        html! {
            section {
                h2 { "Notices" }
                @if num == 0 { p { "None." } } @else {
                    details {
                        summary { (num) @if num == 1 { " notice" } @else { " notices" } }
                        @for arm in self.arms.iter().filter(|arm| !arm.notices.is_empty()) {
                            h3 { (arm.name) }
                            ul { @for notice in &arm.notices { li { (notice) } } }
                        }
                    }
                }
            }
        }
    }
}

/// Plot with its legend and a note on gaps; `None` if it has no lines.
fn drawn(plot: &Plot, gaps: &str) -> Result<Option<Markup>> {
    if plot.curves.is_empty() {
        return Ok(None);
    }
    Ok(Some(html! {
        figure {
            (PreEscaped(plot.svg()?))
            figcaption.legend {
                (legend(plot.curves))
                @if !gaps.is_empty() { p { "Steps without a finite value: " (gaps) "." } }
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{BootstrapConfig, Comparisons, Evaluation, Figures};
    use crate::report::figures::tests::step;

    /// Arm whose metrics all are `value(step)`.
    fn arm(name: &str, num_steps: usize, value: impl Fn(usize) -> Option<f64>) -> ArmCurves {
        let step = |i| step(i, value(i).unwrap_or(f64::NAN));
        let steps = (0..num_steps).map(step).collect();
        ArmCurves { name: name.to_owned(), distills: true, steps, ..Default::default() }
    }

    /// Evaluation with these EERs in U-M and M-M.
    fn evaluated(step: usize, eers: [f64; 2]) -> EvaluationRecord {
        let comparisons = Comparisons::new(vec![0.9, 0.1], vec![true, false], None).unwrap();
        let config = BootstrapConfig { replicates: 0, ..BootstrapConfig::default() };
        let result = |eer: f64| {
            let mut result = Figures::new(&comparisons, 0, &config).unwrap().compute(None).unwrap();
            result.metrics.eer = eer;
            result
        };
        let settings = [(Setting::UM, result(eers[0])), (Setting::MM, result(eers[1]))];
        EvaluationRecord { step, epoch: 0, evaluation: Evaluation { settings: settings.into() } }
    }

    fn page(arms: Vec<ArmCurves>) -> String {
        TrainingReport { title: "a training".to_owned(), arms, ..Default::default() }.page().unwrap()
    }

    #[test]
    fn a_page_says_what_it_was_given_and_loads_nothing() {
        let mut hg = arm("hg", 300, |step| (step % 100 != 7).then_some(1.0 + step as f64));
        hg.is_finished = true;
        hg.notices = vec!["a batch was left out".to_owned()];
        hg.evaluations = vec![evaluated(100, [0.25, f64::NAN]), evaluated(300, [0.125, f64::NAN])];
        let mut report = TrainingReport {
            title: "a training".to_owned(),
            provenance: vec![("commit".to_owned(), "abc".to_owned())],
            arms: vec![arm("teacher", 300, |_| None), hg],
            samples: vec![SampleRow { caption: "teacher".to_owned(), images: vec![vec![1, 2, 3]; 2] }],
            tables: vec!["model | EER %".to_owned()],
            conclusion: "It has learnt.".to_owned(),
        };
        let page = report.page().unwrap();
        for part in [
            "Steps without a finite value: 3 of 300 of hg.",
            "hg: EER, %",
            "U-M",
            "1 notice<",
            "a batch was left out",
            "data:image/png;base64,AQID",
            "model | EER %",
            "It has learnt.",
            "<th>commit</th><td>abc</td>",
            "<td>finished</td>",
            "Distillation loss",
        ] {
            assert!(page.contains(part), "{part} is missing");
        }
        // A plot for each metric, one of the error rates and a strip of samples. Neither the arm nor the setting
        // without a finite value has a line.
        assert_eq!(page.matches("</figure>").count(), FIGURES.len() + 1 + 1);
        assert!(!page.contains("teacher: ") && !page.contains("M-M") && !page.contains("<script"));
        let elsewhere =
            page.match_indices("http").filter(|(at, _)| !page[*at..].starts_with("http://www.w3.org/2000/svg"));
        assert_eq!(elsewhere.count(), 0);

        // A later page replaces an earlier one.
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("new");
        report.write(&folder).unwrap();
        report.conclusion = "It has learnt more.".to_owned();
        report.write(&folder).unwrap();
        let written = std::fs::read_to_string(folder.join("report.html")).unwrap();
        assert!(written.contains("It has learnt more."));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    }

    #[test]
    fn whatever_the_figures_are_there_is_a_page() {
        assert!(page(vec![]).contains("Nothing has been trained yet."));
        let empty = page(vec![arm("lg", 0, |_| None)]);
        assert!(empty.contains("<th>lg</th>") && !empty.contains("<svg"));
        assert!(!page(vec![arm("lg", 50, |_| None)]).contains("<svg"));
        let lonely = page(vec![arm("lg", 1, |_| Some(2.0))]);
        assert_eq!(lonely.matches("<circle").count(), FIGURES.len());
        let largest = |step: usize| Some([f64::MAX, -f64::MAX, 0.0, f64::INFINITY, f64::NAN, 1e-320][step % 6]);
        let wide = |step: usize| Some([f64::MAX, 1e-320][step % 2]);
        let values: [&dyn Fn(usize) -> Option<f64>; 8] = [
            &|_| Some(0.0),
            &|_| Some(0.1),
            &|_| Some(1e30),
            &|step| Some(1e30 + 1e14 * step as f64),
            &|_| Some(f64::MAX),
            &|_| Some(f64::MIN_POSITIVE),
            &largest,
            &wide,
        ];
        for value in values {
            for num_steps in [1, 2, 3, 1000] {
                let page = page(vec![arm("lg", num_steps, value), arm("hg", 10, |step| Some(step as f64))]);
                assert_eq!(page.matches("<svg width=\"520\"").count(), FIGURES.len());
                assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
            }
        }
        // Steps out of order, and a metric that not all have.
        let mut odd = arm("lg", 3, |_| Some(1.0));
        odd.steps[1].report.mean_cosine = None;
        odd.steps[0].step = usize::MAX;
        odd.steps[2].epoch = usize::MAX;
        odd.evaluations = vec![evaluated(0, [-1e300, 0.0])];
        assert!(page(vec![odd]).contains("Steps without a finite value: 1 of 3 of lg"));
        let mut alone = arm("aug", 3, |_| Some(1.0));
        alone.distills = false;
        assert!(!page(vec![alone]).contains("Distillation loss"));
    }

    #[test]
    fn magnitudes_are_on_a_logarithmic_axis_where_they_are_far_apart() {
        // Only the logarithmic axes have a tick at 0.01 here.
        let has_decade = |value: fn(usize) -> Option<f64>| page(vec![arm("lg", 300, value)]).matches("0.01\n").count();
        assert_eq!(
            has_decade(|step| Some(0.1f64.powi(step as i32 % 4))),
            FIGURES.iter().filter(|figure| figure.is_magnitude).count()
        );
        assert_eq!(has_decade(|step| Some(if step == 0 { 0.0 } else { 0.1f64.powi(step as i32 % 4) })), 0);
    }

    #[test]
    fn nothing_is_taken_for_markup() {
        let name = "<b>&\"'";
        let text = || name.to_owned();
        let mut arm = arm(name, 3, |step| (step > 0).then_some(1.0));
        arm.notices = vec![text()];
        let report = TrainingReport {
            title: text(),
            provenance: vec![(text(), text())],
            arms: vec![arm],
            samples: vec![SampleRow { caption: text(), images: vec![vec![0]] }],
            tables: vec![text()],
            conclusion: text(),
        };
        let page = report.page().unwrap();
        assert!(!page.contains("<b>") && page.contains("&lt;b&gt;&amp;"));
        assert!(page.contains("alt=\"&lt;b&gt;&amp;&quot;'\""), "{page}");
    }

    #[test]
    fn a_million_steps_are_a_small_page() {
        let page = page(vec![arm("hg", 1_000_000, |i| Some((i % 977) as f64))]);
        assert!(page.contains("mean of up to 1667 steps"));
        assert!(page.len() < 200_000, "{} bytes", page.len());
    }
}
