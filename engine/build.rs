//! Builds the small static program that Skep carries: the `whoami` server of the built-in image,
//! and the init that reaps zombies in containers that ask for one. Plain rustc, no dependencies.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=tiny/main.rs");
    let var = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let out = PathBuf::from(var("OUT_DIR")).join("tiny");
    let status = Command::new(var("RUSTC"))
        .args(["--edition=2024", "--crate-name=skep_tiny", "--crate-type=bin", "tiny/main.rs", "-o"])
        .arg(&out)
        .args(["--target", &var("TARGET")])
        .args(["-Copt-level=s", "-Cpanic=abort", "-Cstrip=symbols", "-Clto=fat", "-Ccodegen-units=1"])
        .args(["-Ctarget-feature=+crt-static", "-Crelocation-model=static"])
        .status()
        .expect("rustc runs");
    assert!(status.success(), "tiny/main.rs does not build");
}
