//! Which vector instructions may this process use?
//!
//! An [`Isa`] can only be obtained for a CPU that has it, so a kernel that holds one never checks again.

use std::sync::OnceLock;

/// Environment variable that forces an instruction set: `scalar`, `avx2` or `avx512`.
pub const ISA_VARIABLE: &str = "MOSAICKV_ISA";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Scalar,
    Avx2,
    Avx512,
}

/// An instruction set that this CPU is known to have. `Scalar` is portable Rust; `Avx2` needs AVX2, FMA,
/// F16C, POPCNT and BMI; `Avx512` needs AVX-512 F, BW, DQ, VL and VNNI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(pub(crate) Kind);

impl Isa {
    /// Portable code, on every CPU.
    pub const SCALAR: Isa = Isa(Kind::Scalar);

    /// All that this CPU has, slowest first. Never empty.
    pub fn available() -> &'static [Isa] {
        static FOUND: OnceLock<Vec<Isa>> = OnceLock::new();
        FOUND.get_or_init(|| {
            let mut found = vec![Isa::SCALAR];
            #[cfg(target_arch = "x86_64")]
            {
                let avx2 = is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
                    && is_x86_feature_detected!("popcnt")
                    && is_x86_feature_detected!("bmi1")
                    && is_x86_feature_detected!("bmi2");
                if avx2 {
                    found.push(Isa(Kind::Avx2));
                }
                let avx512 = avx2
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni");
                if avx512 {
                    found.push(Isa(Kind::Avx512));
                }
            }
            found
        })
    }

    /// The set that kernels use: the fastest available, or the one that `MOSAICKV_ISA` names.
    ///
    /// # Panics
    /// If the variable names a set that does not exist or that this CPU lacks: a forced test must not run
    /// something else in silence.
    pub fn current() -> Isa {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| {
            let available = Isa::available();
            match std::env::var(ISA_VARIABLE) {
                Err(_) => available[available.len() - 1],
                Ok(name) => *available.iter().find(|isa| isa.name() == name).unwrap_or_else(|| {
                    let have: Vec<_> = available.iter().map(|isa| isa.name()).collect();
                    panic!("{ISA_VARIABLE}={name}: this CPU has {have:?}; unset it or name one of them")
                }),
            }
        })
    }

    /// `scalar`, `avx2` or `avx512`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            Kind::Avx2 => "avx2",
            Kind::Avx512 => "avx512",
        }
    }
}
