//! Rules for packets, through `nft`.

use std::io::{self, Write as _};
use std::process::{Command, Stdio};

/// Applies a script in the calling thread's namespace, all of it or nothing.
pub fn apply(script: &str) -> io::Result<()> {
    let spawned = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut nft = spawned.map_err(|error| {
        io::Error::new(error.kind(), format!("nft cannot be run, install the nftables package: {error}"))
    })?;
    if let Some(mut stdin) = nft.stdin.take() {
        stdin.write_all(script.as_bytes())?;
    }
    let output = nft.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("nft refused the rules: {}", String::from_utf8_lossy(&output.stderr))))
}

/// How the kernel shows a table (`family name`) of the calling thread's namespace.
pub fn show(table: &str) -> io::Result<String> {
    let output = Command::new("nft").args(["-n", "list", "table"]).args(table.split(' ')).output()?;
    if output.status.success() {
        return String::from_utf8(output.stdout).map_err(io::Error::other);
    }
    Err(io::Error::other(format!("nft shows no table {table}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}
