//! Paints one image of one person, back to front.

use image::RgbImage;

use super::camera::Camera;
use super::canvas::Canvas;
use super::draw::Draw;
use super::head::{self, Outline};
use super::identity::Identity;
use super::nuisance::Nuisance;
use super::{eyes, hair, light, marks, mouth, nose, sensor};
use crate::data::Landmarks;

/// Returns the image and its landmarks, px. `noise` drives the sensor's noise.
pub(super) fn render(identity: &Identity, nuisance: &Nuisance, noise: &mut Draw) -> (RgbImage, Landmarks) {
    let Nuisance { pose, expression, scene, .. } = nuisance;
    let lips = mouth::Pose::new(&identity.mouth, expression);
    let tip = &identity.nose;
    let [left, right] = lips.corners();
    let (spacing, eye_v) = (identity.eyes.spacing, identity.eyes.v);
    let face = [[-spacing, eye_v], [spacing, eye_v], [tip.skew, tip.tip_v], left, right];
    let (camera, landmarks) = Camera::new(pose, tip, &face);

    let canvas = &mut Canvas::new(&camera);
    let outline = Outline::new(&identity.skull, lips.chin_drop());
    let worn = hair::of_the_day(&identity.hair, scene);
    let tone = head::skin_tone(identity, scene);
    head::measure(canvas, &outline);
    hair::back(canvas, &worn);
    head::neck(canvas, identity, scene, tone);
    if !worn.covers_ears() {
        head::ears(canvas, &identity.ears, &identity.skull, tone);
    }
    head::paint(canvas, identity, &outline, tone, expression.smile);
    nose::paint(canvas, tip, expression.smile);
    marks::paint(canvas, &identity.marks, &identity.eyes, tone, expression.brow_raise);
    hair::beard(canvas, identity, scene, lips.chin_drop());
    let lip_color = mouth::color(identity, scene, tone);
    mouth::paint(canvas, &identity.mouth, &identity.marks, &lips, lip_color);
    eyes::paint(canvas, &identity.eyes, expression, &nuisance.light);
    eyes::brows(canvas, &identity.brows, &identity.eyes, expression.brow_raise);
    hair::front(canvas, &worn, &outline);
    if scene.has_glasses {
        marks::glasses(canvas, &scene.glasses, &identity.eyes);
    }
    let radiance = light::shade(canvas, &nuisance.light, scene);
    (sensor::expose(radiance, &nuisance.sensor, noise), landmarks)
}
