//! A drawing in pixels, for where SVG can't be shown.

use resvg::tiny_skia::{Color, Pixmap, Transform};
use resvg::usvg::fontdb::{Database, Family, Query};
use resvg::usvg::{Options, Tree};

/// Pixels of a unit of the drawing, each way.
const SCALE: f32 = 2.0;

/// A PNG file of an SVG drawing, on white. Texts are set in a font of this system; where it has none they are left out, which the
/// log says.
pub fn png(svg: &str) -> Result<Vec<u8>, String> {
    let mut options = Options::default();
    let fonts = options.fontdb_mut();
    fonts.load_system_fonts();
    // What this system calls sans-serif, else a family that is likely to be there.
    let has =
        |fonts: &Database, family| fonts.query(&Query { families: &[family], ..Query::default() }).is_some();
    if !has(fonts, Family::SansSerif) {
        let names = ["DejaVu Sans", "Liberation Sans", "Noto Sans", "Arial"];
        match names.into_iter().find(|name| has(fonts, Family::Name(name))) {
            Some(name) => fonts.set_sans_serif_family(name),
            None => {
                tracing::warn!("a picture without texts: no font of this system is known to be one for texts")
            }
        }
    }
    let tree = Tree::from_str(svg, &options).map_err(|error| format!("the drawing is no SVG: {error}"))?;
    let (width, height) = (tree.size().width() * SCALE, tree.size().height() * SCALE);
    let mut pixels = Pixmap::new(width.ceil() as u32, height.ceil() as u32)
        .ok_or_else(|| format!("a picture of {width} times {height} pixels"))?;
    pixels.fill(Color::WHITE);
    resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
    pixels.encode_png().map_err(|error| format!("the picture cannot be written: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_have_the_drawings_colours() {
        let svg = r##"<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20"><rect x="10" y="0" width="20" height="20" fill="#0072B2"/></svg>"##;
        let pixels = Pixmap::decode_png(&png(svg).unwrap()).unwrap();
        assert_eq!((pixels.width(), pixels.height()), (60, 40));
        let colour = |x, y| pixels.pixel(x, y).map(|p| (p.red(), p.green(), p.blue(), p.alpha()));
        assert_eq!((colour(5, 20), colour(40, 20)), (Some((255, 255, 255, 255)), Some((0, 114, 178, 255))));
        assert!(png("<p>no drawing</p>").is_err());
    }
}
