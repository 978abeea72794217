//! Plugins of docker's client: programs called `docker-NAME` that serve `skep NAME` as they serve `docker NAME`.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::bail;

use crate::client::{DEFAULT_HOST, Target, host_from_environment};
use crate::context;
use crate::credentials::Config;

/// Where systems keep them, beside the user's own.
const SYSTEM_DIRS: [&str; 4] = [
    "/usr/local/lib/docker/cli-plugins",
    "/usr/local/libexec/docker/cli-plugins",
    "/usr/lib/docker/cli-plugins",
    "/usr/libexec/docker/cli-plugins",
];

/// Becomes the plugin that `command` names first, with the whole command line; it talks to the daemon that we would.
pub(crate) fn run(target: &Target, command: &[OsString], line: &[OsString]) -> anyhow::Result<ExitCode> {
    let name = command.first().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(program) = find(name)? else {
        bail!("unknown command {name:?}, and no plugin docker-{name} is installed: see 'skep --help'");
    };
    let mut plugin = Command::new(program);
    plugin.args(&line[1..]).env("DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND", &line[0]);
    match target.context()? {
        named if named != context::DEFAULT => plugin.env("DOCKER_CONTEXT", named).env_remove("DOCKER_HOST"),
        _ => {
            let host = target.host.clone().or_else(host_from_environment);
            plugin.env("DOCKER_HOST", host.unwrap_or_else(|| DEFAULT_HOST.to_owned()))
        }
    };
    plugin.env("DOCKER_CONFIG", Config::dir()?);
    Err(anyhow::Error::new(plugin.exec()).context(format!("the plugin docker-{name} cannot be run")))
}

fn find(name: &str) -> anyhow::Result<Option<PathBuf>> {
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()) {
        return Ok(None);
    }
    let own = Config::dir()?.join("cli-plugins");
    let dirs = [own].into_iter().chain(SYSTEM_DIRS.map(PathBuf::from));
    Ok(dirs.map(|dir| dir.join(format!("docker-{name}"))).find(|program| program.is_file()))
}
