//! Compiles the gRPC services with protox, so that no `protoc` is needed on the host.

/// What clients with BuildKit speak.
const BUILDKIT: [&str; 6] =
    ["control.proto", "gateway.proto", "session.proto", "secrets.proto", "ssh.proto", "upload.proto"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["swarm.proto"], ["proto"])?;
    tonic_prost_build::configure().compile_fds(files)?;
    let files = protox::compile(BUILDKIT, ["proto/buildkit"])?;
    tonic_prost_build::configure().compile_fds(files)?;
    Ok(())
}
