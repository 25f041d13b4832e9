//! Attention over layered pages against f64 over what the pages decode to.

use super::super::oracle;
use super::super::score::sketch;
use super::super::tests::{normal, storable};
use super::*;
use std::ops::Range;

const WIDTHS: [usize; 4] = [16, 64, 80, 128];
const ROWS: [usize; 6] = [1, 2, 3, 4, 5, 8];

/// Pages of several sizes and profiles, with escapes; and queries of scores that spread over about `spread`.
fn pages(d: usize) -> Pages {
    let n = (d / GROUP) as u8;
    let profiles = [
        Profile { eight: 1, four: n / 2, two: n - 1 - n / 2 },
        Profile::default(),
        Profile { eight: 0, four: 1, two: 1 },
        Profile { eight: n, four: 0, two: 0 },
        Profile { eight: 0, four: n / 2, two: 0 },
        Profile { eight: 0, four: 0, two: n },
    ];
    let mut pages = Pages::new(d);
    for (i, tokens) in [64, 17, 64, 1, 33, 64, 16, 48, 64].into_iter().enumerate() {
        let (mut k, mut v) = (normal(1 + i as u64, tokens * d), normal(100 + i as u64, tokens * d));
        k[(i * 7) % (tokens * d)] = 7.5;
        v[(i * 31) % (tokens * d)] = -9.25;
        v[tokens * d - d] = 6.0;
        pages.push((&k, &v), storable(d, (profiles[i % 6], profiles[(i * 5 + i / 6 + 3) % 6])));
    }
    pages
}

/// Attention to all tiles of some pages.
fn attend(isa: Isa, queries: &Queries, pages: &Pages, range: Range<usize>, state: &mut AttnState) {
    let visits: Vec<_> = range.map(|page| (page as u32, ALL_TILES)).collect();
    attend_tiles(isa, queries, pages, &visits, state);
}

fn queries(d: usize, rows: usize, spread: f32) -> (Vec<f32>, Vec<f32>) {
    let mut q = normal(7, rows * d);
    q.iter_mut().for_each(|x| *x *= spread / (d as f32).sqrt());
    (q, normal(8, rows))
}

/// Scores of row `r` over a page: with the query as it is, and rounded where it meets codes.
fn scores(queries: &Queries, r: usize, pages: &Pages, index: usize) -> [Vec<f64>; 2] {
    let (keys, _) = pages.decode(index);
    let offset = f64::from(queries.scale_and_offset(r).1);
    let dot = |key: &[f32]| -> f64 {
        key.iter().zip(queries.exact(r)).map(|(&k, &q)| f64::from(q) * f64::from(k)).sum::<f64>() + offset
    };
    let of_given = keys.chunks_exact(pages.head_dim()).map(dot).collect();
    [of_given, oracle::scores(queries, r, pages, index)]
}

/// What row `r` should get from the tokens of the visited tiles: with the query as it is, and rounded.
fn attended(queries: &Queries, r: usize, pages: &Pages, visits: &[(u32, u8)]) -> [Vec<f64>; 2] {
    let d = pages.head_dim();
    let (mut all, mut values) = ([vec![], vec![]], vec![]);
    for &(index, tiles) in visits {
        let scores = scores(queries, r, pages, index as usize);
        let (_, of_page) = pages.decode(index as usize);
        for (token, value) in of_page.chunks_exact(d).enumerate() {
            if tiles >> (token / TILE_TOKENS) & 1 == 1 {
                all.iter_mut().zip(&scores).for_each(|(all, scores)| all.push(scores[token]));
                values.extend(value.iter().map(|&x| f64::from(x)));
            }
        }
    }
    // One channel whose keys are the scores.
    all.map(|scores| crate::oracle::attend(&[1.0], &scores, &values, 1.0))
}

fn finish(state: &AttnState) -> Vec<f32> {
    let mut out = vec![0.0; state.rows() * state.channels()];
    state.finish(&mut out);
    out
}

fn farthest(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).abs()).fold(0.0, |a: f64, b| {
        assert!(!b.is_nan());
        a.max(b)
    })
}

/// The largest errors against the rounded and against the given queries, in the largest value's magnitude.
fn errors(isa: Isa, (d, rows): (usize, usize), spread: f32, visits: &[(u32, u8)]) -> [f64; 2] {
    let pages = pages(d);
    let (q, offsets) = queries(d, rows, spread);
    let queries = Queries::new(isa, &q, &offsets);
    let mut state = AttnState::new(rows, d);
    attend_tiles(isa, &queries, &pages, visits, &mut state);
    let out = finish(&state);
    let largest = visits
        .iter()
        .flat_map(|visit| pages.decode(visit.0 as usize).1)
        .fold(0.0, |a: f64, x| a.max(f64::from(x).abs()));
    let mut errors = [0.0f64; 2];
    for r in 0..rows {
        let [exact, rounded] = attended(&queries, r, &pages, visits);
        let got = &out[r * d..][..d];
        errors[0] = errors[0].max(farthest(got, &rounded) / largest);
        errors[1] = errors[1].max(farthest(got, &exact) / largest);
    }
    errors
}

#[test]
fn attention_is_that_of_the_decoded_pages() {
    let mut most = [0.0f64; 2];
    for &isa in Isa::available() {
        for d in WIDTHS {
            for rows in ROWS {
                for spread in [0.1, 2.0, 8.0] {
                    for range in [0..9, 0..1, 1..4, 3..4, 5..9] {
                        let visits: Vec<_> = range.map(|page| (page, ALL_TILES)).collect();
                        let [tight, loose] = errors(isa, (d, rows), spread, &visits);
                        most = [most[0].max(tight), most[1].max(loose)];
                        let what =
                            format!("{isa:?}, D {d}, R {rows}, spread {spread}, {visits:?}: {tight} {loose}");
                        assert!(tight < 3e-4, "{what}");
                        assert!(loose < 1e-2 * f64::from(spread).max(1.0), "{what}");
                    }
                }
            }
        }
    }
    println!("largest errors: {most:?}");
}

#[test]
fn chosen_tiles_are_attended_to_and_no_others() {
    let choices: [&[(u32, u8)]; 4] = [
        &[(0, 0b0100), (1, 0b1101), (2, 0b0010), (4, 0b0111), (8, 0b1010)],
        &[(8, 0b0111), (2, 0b1011), (0, 0b1111), (3, 0b1111)],
        &[(1, 0b1000), (5, 0b0001), (6, 0b0010)],
        &[(0, 0), (7, 0b1000), (7, 0b0101)],
    ];
    for &isa in Isa::available() {
        for d in WIDTHS {
            for rows in ROWS {
                for visits in choices {
                    let [tight, loose] = errors(isa, (d, rows), 2.0, visits);
                    assert!(tight < 3e-4 && loose < 2e-2, "{isa:?} {d} {rows} {visits:?}: {tight} {loose}");
                }
            }
        }
    }
}

/// Also where rounding leaves more of an exponent than the largest weight's bytes have room for.
#[test]
fn scores_of_thousands_weigh_what_they_should() {
    for &isa in Isa::available() {
        for (d, rows) in [(16, 1), (64, 3), (80, 8), (128, 4)] {
            let pages = pages(d);
            let visits: Vec<_> = (0..9).map(|page| (page, ALL_TILES)).collect();
            for spread in [0.0, 0.1, 2.0, 700.0] {
                for step in 0..40 {
                    let (q, _) = queries(d, rows, spread);
                    let sign = if step % 2 == 0 { 1.0 } else { -1.0 };
                    let offsets: Vec<f32> =
                        (0..rows).map(|r| sign * (2000.0 + 0.37 * (step * rows + r) as f32)).collect();
                    let queries = Queries::new(isa, &q, &offsets);
                    let mut state = AttnState::new(rows, d);
                    attend(isa, &queries, &pages, 0..9, &mut state);
                    for (r, got) in finish(&state).chunks_exact(d).enumerate() {
                        let [_, rounded] = attended(&queries, r, &pages, &visits);
                        // The magnitude of the largest value is 9.25; an f32 score is off by 1e-4.
                        let error = farthest(got, &rounded) / 9.25;
                        assert!(
                            error < 3e-4,
                            "{isa:?}, D {d}, spread {spread}, offset {}: {error}",
                            offsets[r]
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_split_range_gives_the_same_and_so_do_all_instruction_sets() {
    let (d, rows) = (80, 5);
    let pages = pages(d);
    let (q, offsets) = queries(d, rows, 2.0);
    let of = |isa: Isa, ranges: &[(usize, usize)]| {
        let queries = Queries::new(isa, &q, &offsets);
        let mut all = AttnState::new(rows, d);
        for &(from, to) in ranges {
            let mut state = AttnState::new(rows, d);
            attend(isa, &queries, &pages, from..to, &mut state);
            all.merge(&state);
        }
        finish(&all)
    };
    let want: Vec<f64> = of(Isa::SCALAR, &[(0, 9)]).iter().map(|&x| f64::from(x)).collect();
    for &isa in Isa::available() {
        let splits: [&[(usize, usize)]; 4] =
            [&[(0, 9)], &[(0, 4), (4, 9)], &[(3, 9), (0, 3)], &[(0, 1), (1, 1), (1, 8), (8, 9)]];
        for ranges in splits {
            let error = farthest(&of(isa, ranges), &want);
            assert!(error < 1e-5, "{isa:?} {ranges:?}: {error}");
        }
        // One state through several calls.
        let queries = Queries::new(isa, &q, &offsets);
        let mut state = AttnState::new(rows, d);
        attend(isa, &queries, &pages, 0..3, &mut state);
        attend(isa, &queries, &pages, 3..9, &mut state);
        assert!(farthest(&finish(&state), &want) < 1e-5);
    }
}

#[test]
fn runs_longer_than_what_is_summed_up_at_once() {
    let d = 16;
    let mut pages = Pages::new(d);
    let profile = Profile { eight: 1, four: 0, two: 1 };
    for i in 0..2 * RUN as u64 + 5 {
        pages.push((&normal(i, 3 * d), &normal(i + 500, 3 * d)), storable(d, (profile, profile)));
    }
    let (q, offsets) = queries(d, 6, 3.0);
    let visits: Vec<_> = (0..pages.pages.len() as u32).map(|page| (page, ALL_TILES)).collect();
    for &isa in Isa::available() {
        let queries = Queries::new(isa, &q, &offsets);
        let mut state = AttnState::new(6, d);
        attend(isa, &queries, &pages, 0..visits.len(), &mut state);
        for (r, got) in finish(&state).chunks_exact(d).enumerate() {
            let [_, rounded] = attended(&queries, r, &pages, &visits);
            assert!(farthest(got, &rounded) < 1e-3);
        }
    }
}

#[test]
fn a_sketch_is_the_weights_by_the_first_groups() {
    for &isa in Isa::available() {
        for (d, rows) in [(16, 1), (64, 3), (80, 5), (128, 4)] {
            let pages = pages(d);
            let (q, offsets) = queries(d, rows, 2.0);
            let queries = Queries::new(isa, &q, &offsets);
            for range in [0..9, 2..5, 4..4] {
                let stride = range.len() * TILES;
                let mut out = vec![f32::NAN; rows * stride];
                let shifts: Vec<f32> = (0..rows).map(|r| r as f32 - 2.0).collect();
                let mut by_rows: Vec<&mut [f32]> = out.chunks_exact_mut(stride.max(1)).collect();
                by_rows.resize_with(rows, || &mut []);
                sketch(isa, (&queries, &shifts), (&pages, range.clone()), &mut by_rows);
                for (at, got) in out.iter().enumerate() {
                    let (r, index, tile) = (at / stride, range.start + at % stride / TILES, at % TILES);
                    let want = oracle::sketch(&queries, (r, f64::from(shifts[r])), &pages, index)[tile];
                    assert!(
                        (f64::from(*got) - want).abs() <= 0.041 * want,
                        "{isa:?} {d} {at}: {got}, wanted {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn sketched_weights_stay_numbers_whatever_the_scores() {
    let d = 64;
    let pages = pages(d);
    let (q, _) = queries(d, 2, 1e4);
    for &isa in Isa::available() {
        let queries = Queries::new(isa, &q, &[1e6, -1e6]);
        let mut out = vec![f32::NAN; 2 * 9 * TILES];
        let (heavy, light) = out.split_at_mut(9 * TILES);
        sketch(isa, (&queries, &[0.0; 2]), (&pages, 0..9), &mut [&mut *heavy, &mut *light]);
        assert!(heavy.iter().all(|w| (0.0..2e27).contains(w)) && heavy[0] > 1e26, "{isa:?}: {heavy:?}");
        assert!(light.iter().all(|w| (0.0..1e-36).contains(w)), "{isa:?}: {light:?}");
    }
}

#[test]
fn queries_of_zeros_weigh_all_tokens_alike() {
    let (d, rows) = (64, 3);
    let pages = pages(d);
    for &isa in Isa::available() {
        let mut queries = Queries::new(isa, &vec![1.0; 5 * d], &[1.0; 5]);
        queries.set(isa, &vec![0.0; rows * d], &[-3.0; 3]);
        let mut state = AttnState::new(rows, d);
        attend(isa, &queries, &pages, 0..2, &mut state);
        let [want, _] = attended(&queries, 0, &pages, &[(0, ALL_TILES), (1, ALL_TILES)]);
        for got in finish(&state).chunks_exact(d) {
            assert!(farthest(got, &want) < 1e-5);
        }
    }
}
