//! Compiles the CUDA kernels: for GPUs (feature `cuda`), and for the host, to be run in tests (`cuda-emulated`, where there is a C++ compiler).
//! Without these features it does nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(emulated)");
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        for_gpus();
    }
    #[cfg(feature = "cuda-emulated")]
    for_the_host();
}

/// Machine code for Ampere and Hopper and PTX for what comes after, in one file, `kernels.fatbin`; what the kernels take of a multiprocessor, in
/// `resources.txt`.
fn for_gpus() {
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-env-changed=NVCC");
    println!("cargo::rerun-if-env-changed=PATH");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = find_nvcc();
    let result = Command::new(&nvcc)
        .args(["-std=c++17", "-O3", "-fatbin", "-Xptxas", "-v"])
        .args(["-gencode", "arch=compute_80,code=sm_80"])
        .args(["-gencode", "arch=compute_90a,code=sm_90a"])
        .args(["-gencode", "arch=compute_80,code=compute_80"])
        .arg("-o")
        .arg(out.join("kernels.fatbin"))
        .arg("cuda/kernels.cu")
        .output()
        .unwrap_or_else(|e| {
            panic!(
                "{}: {e}. Feature `cuda` needs CUDA's compiler: `scripts/cuda-toolchain` brings it, or set NVCC",
                nvcc.display()
            )
        });
    let said = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.success(), "{} failed:\n{said}", nvcc.display());
    fs::write(out.join("resources.txt"), &*said).expect("OUT_DIR is writable");
}

/// That of `NVCC`, of `scripts/cuda-toolchain`, or of the path.
fn find_nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let lib = Path::new("../../target/cuda-toolchain/lib");
    let pythons = fs::read_dir(lib).into_iter().flatten().flatten();
    let brought = pythons.map(|python| python.path().join("site-packages/nvidia/cu13/bin/nvcc"));
    brought.filter(|nvcc| nvcc.is_file()).min().unwrap_or_else(|| "nvcc".into())
}

/// A static library with the kernels and what runs them thread by thread, and the `cfg` that says that it is there. The emulation is
/// written for x86-64 with Linux; who has another system or no C++ compiler gets everything but these tests.
#[cfg(feature = "cuda-emulated")]
fn for_the_host() {
    println!("cargo::rerun-if-changed=cuda");
    let target = |part| env::var(format!("CARGO_CFG_TARGET_{part}")).unwrap_or_default();
    let is_known = target("OS") == "linux" && target("ARCH") == "x86_64";
    let mut build = cc::Build::new();
    let mut compiler = build.cpp(true).get_compiler().to_command();
    if !is_known || !compiler.arg("--version").output().is_ok_and(|said| said.status.success()) {
        println!(
            "cargo::warning=SKIPPED: tests of kernels for GPUs, which take x86-64, Linux and a C++ compiler"
        );
        // There may be a compiler next time: what is never there is always looked for again.
        println!("cargo::rerun-if-changed=no-compiler");
        return;
    }
    println!("cargo::rustc-cfg=emulated");
    // Fibers leave functions by `longjmp`.
    build
        .std("c++17")
        .opt_level(2)
        .flag("-U_FORTIFY_SOURCE")
        .flag_if_supported("-mf16c")
        .flag_if_supported("-Wno-unknown-pragmas")
        .flag_if_supported("-Wno-unused-function")
        .file("cuda/emulated.cpp")
        .compile("mosaickv_emulated");
}
