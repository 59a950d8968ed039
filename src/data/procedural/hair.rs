//! Hair of the head, and beards.

use super::canvas::{Canvas, Pixel};
use super::draw::noise;
use super::head::{HIDDEN, Outline};
use super::identity::{Beard, Hair, HairStyle, Identity};
use super::nuisance::Scene;
use super::shape::{Rgb, bump, cover, lerp, mix, ramp, scaled};

/// Returns `hair` as worn in one image.
pub(super) fn of_the_day(hair: &Hair, scene: &Scene) -> Hair {
    let is_tied = scene.ties_hair && hair.covers_ears();
    Hair {
        style: if is_tied { HairStyle::TiedBack } else { hair.style },
        color: scaled(hair.color, scene.hair_light),
        line_v: hair.line_v + scene.hair_shift,
        side_v: if is_tied { 44.0 } else { hair.side_v + scene.hair_shift },
        volume: hair.volume * scene.hair_volume,
        ..*hair
    }
}

/// Relative brightness of a strand of hair, about -1 to 1. Strands run along the direction in which `across` is
/// constant.
fn strands(hair: &Hair, across: f32, along: f32) -> f32 {
    let straight =
        0.55 * noise(0.75 * across, 0.07 * along, hair.salt) + 0.35 * noise(1.6 * across, 0.12 * along, !hair.salt);
    if hair.curl < 0.05 {
        return straight;
    }
    let curls =
        0.8 * noise(0.33 * across, 0.33 * along, hair.salt ^ 5) + 0.4 * noise(0.8 * across, 0.8 * along, hair.salt ^ 9);
    lerp(straight, curls, hair.curl)
}

/// Lays hair on a pixel.
fn lay(p: &mut Pixel, color: Rgb, alpha: f32, strand: f32, height: f32) {
    let light = (1.0 + 0.75 * strand).max(0.15);
    p.lay(scaled(color, light), alpha);
    p.height = lerp(p.height, height + 0.9 * strand, alpha);
    p.gloss = lerp(p.gloss, 0.2 * light, alpha);
    p.open = lerp(p.open, 1.0, alpha);
    p.skin *= 1.0 - alpha;
    p.figure = p.figure.max(alpha);
}

/// Height of the mound of hair over the skull, px: flat on top, falling off towards its edge.
fn mound(p: &Pixel, volume: f32) -> f32 {
    let (edge, low) = (((p.rim - volume + 26.0) / 26.0).max(0.0), (p.v - 62.0) / 58.0);
    -15.0 * edge * edge - 9.0 * low * low
}

/// Paints hair that hangs behind head and neck.
pub(super) fn back(canvas: &mut Canvas, hair: &Hair) {
    let extra = match hair.style {
        HairStyle::Long => 9.0,
        HairStyle::Bob => 6.0,
        HairStyle::Curly => 7.0,
        _ => return,
    };
    canvas.everywhere(|p| {
        if p.rim < HIDDEN {
            return;
        }
        let wave = (1.0 + 3.0 * hair.curl) * noise(0.12 * p.u, 0.10 * p.v, hair.salt ^ 3);
        // Down the neck the hair keeps the width it had at the cheeks.
        let outer = if p.v > 62.0 { p.u.abs() - 41.0 } else { p.rim };
        let reach = hair.volume + extra * ramp(20.0, 90.0, p.v);
        let alpha = cover((outer - reach + wave).max(p.v - hair.side_v + wave), 1.8);
        if alpha > 0.0 {
            let strand = strands(hair, p.u, p.v) - 0.35;
            lay(p, hair.color, alpha, strand, -16.0 - 0.5 * (outer - 2.0).max(0.0));
            p.open = lerp(1.0, 0.55, alpha * ramp(36.0, 26.0, p.u.abs()));
        }
    });
}

/// Paints hair in front of the head: the hairline, the fringe and the sides.
pub(super) fn front(canvas: &mut Canvas, hair: &Hair, outline: &Outline) {
    let volume = hair.volume;
    let curtain = hair.covers_ears();
    let band = match hair.style {
        HairStyle::Long | HairStyle::Bob => 4.0 + 0.6 * volume,
        HairStyle::Curly => 4.5,
        HairStyle::Bald | HairStyle::TiedBack => 1.6,
        _ => 3.0,
    };
    let rough = 1.0 + 2.0 * hair.curl;
    canvas.everywhere(|p| {
        if p.rim > volume + 6.0 || p.rim < -band - 5.0 && p.v > 48.0 {
            return;
        }
        let side = p.u.abs();
        let part = ramp(-16.0, 16.0, p.u - hair.part_u);
        let sweep = match hair.style {
            HairStyle::Parted | HairStyle::Long | HairStyle::Bob => {
                7.0 * bump(p.u - hair.part_u - 26.0, 0.0, 26.0, 1.0) - 2.0 * part
            }
            _ => 0.0,
        };
        let line = hair.line_v + 0.011 * p.u * p.u + hair.peak * bump(p.u, 0.0, 9.0, 1.0)
            - hair.recede * bump(side - 21.0, 0.0, 14.0, 1.0)
            + sweep;
        let top = p.v - line;
        let [width, _] = outline.at(p.v.min(62.0));
        let lock = band * ramp(-4.0, 22.0, p.v) + if curtain { 2.0 * ramp(70.0, 40.0, p.v) } else { 0.0 };
        let sides = (width - lock - side).max(p.v - hair.side_v - 0.5 * (width - side));
        if top.min(sides) > 2.0 * rough + 2.0 {
            return;
        }
        let ragged = rough
            * (0.8 * noise(0.45 * p.u, 0.06 * p.v, hair.salt ^ 1) + 0.5 * noise(0.2 * p.u, 0.2 * p.v, hair.salt ^ 2));
        // Short hair lies closer to the skull the further down it is.
        let puff = if curtain { volume } else { lerp(volume, 0.6, ramp(-6.0, hair.side_v - 8.0, p.v)) };
        let d = (top.min(sides) + ragged).max(p.rim - puff + 0.5 * ragged);
        let alpha = cover(d, if hair.style == HairStyle::Fringe { 1.6 } else { 2.6 });
        if alpha == 0.0 {
            return;
        }
        // Strands fan out from the parting over the top and hang down at the sides.
        let fan = p.u + 0.55 * (p.u - hair.part_u) * ramp(-30.0, 30.0, p.v);
        let strand = strands(hair, if sides < top { p.u - 0.2 * p.v } else { fan }, p.v);
        let thick = 0.4 * volume * ramp(0.0, 6.0, -d);
        lay(p, hair.color, alpha, strand, lerp(p.height, mound(p, volume), ramp(-13.0, -1.5, p.rim)) + thick);
    });
    // The hair shades the skin below it.
    canvas.everywhere(|p| {
        if p.skin > 0.5 && p.v < hair.line_v + 20.0 && hair.style != HairStyle::Bald {
            let below = p.v - hair.line_v - 0.011 * p.u * p.u;
            p.crease(0.14 * ramp(7.0, 0.0, below));
        }
    });
}

/// Paints stubble, moustache, goatee and full beard. The lips are painted over it.
pub(super) fn beard(canvas: &mut Canvas, identity: &Identity, scene: &Scene, drop: f32) {
    let Beard { stubble, moustache, goatee, full, color } = identity.beard;
    let most = stubble.max(moustache).max(goatee).max(full);
    if most <= 0.0 {
        return;
    }
    let (mouth, nose, salt) = (&identity.mouth, &identity.nose, identity.hair.salt);
    let (lip_v, base_v) = (mouth.v - mouth.upper, nose.tip_v + 6.0);
    let chin_v = identity.skull.chin_v + drop;
    canvas.around([0.0, 90.0], [48.0, 36.0], |p| {
        let inside = cover(p.rim - 1.0, 2.0) * p.skin;
        if inside == 0.0 {
            return;
        }
        let side = p.u.abs();
        let out = 1.0 + p.rim / 40.0;
        let ragged = 1.3 * noise(0.4 * p.u, 0.3 * p.v, salt ^ 21);
        // The beard's upper edge falls from the sideburns to the corner of the mouth.
        let cheek = lerp(mouth.v - 4.0, 58.0, (out * out * out).clamp(0.0, 1.0)) - p.v + ragged;
        let jaw = ramp(2.0, -4.0, cheek)
            * (1.0 - ramp(2.0, -1.5, side - mouth.half_w) * ramp(mouth.v + 1.0, mouth.v - 2.0, p.v));
        let lip_d =
            (base_v - p.v + 0.04 * side * side).max(side - mouth.half_w - 2.5).max(p.v - lip_v - 4.5 - 0.2 * side);
        let lip = cover(lip_d + 0.6 * ragged, 3.0);
        let around_chin = bump(p.u, p.v - 0.5 * (mouth.v + chin_v) - 3.0, 21.0, 19.0);
        let tuft = ramp(0.12, 0.5, around_chin) * ramp(mouth.v - 3.0, mouth.v + 3.0, p.v);
        let shave = scene.shave.max(0.0);
        let hair = (full * jaw).max(moustache * lip).max(goatee * tuft) * (1.0 + 0.12 * ragged);
        let shadow = stubble * jaw.max(lip) * 0.5;
        let strand = noise(1.1 * p.u, 0.45 * p.v, salt ^ 22);
        let alpha = (hair * shave).clamp(0.0, 0.97) * inside;
        let blue: Rgb = mix(color, [0.05, 0.05, 0.055], 0.4);
        p.lay(blue, (shadow * shave * (1.0 + 0.3 * strand)).clamp(0.0, 0.6) * inside);
        p.lay(scaled(color, (0.95 + 0.7 * strand).max(0.2)), alpha);
        p.height += alpha * (1.2 + 0.7 * strand);
        p.gloss *= 1.0 - alpha.max(shadow);
        p.skin *= 1.0 - alpha;
    });
}
