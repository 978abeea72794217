//! What a container is made from: the options of `skep run` and `skep create`.

use anyhow::Context as _;
use serde_json::{Map, Value, json};

use crate::client::escape;

#[derive(clap::Args)]
pub(crate) struct CreateArgs {
    #[arg(long, default_value = "")]
    name: String,
    /// Hand our input on
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Remove it when it has ended
    #[arg(long)]
    pub(crate) rm: bool,
    /// NAME=value, or the name of one of our own variables (repeatable)
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// A file with a variable on each line
    #[arg(long = "env-file", value_name = "FILE")]
    env_files: Vec<std::path::PathBuf>,
    #[arg(short, long = "label", value_name = "KEY[=VALUE]")]
    labels: Vec<String>,
    /// NAME:TARGET[:ro], /HOST/PATH:TARGET[:ro], or TARGET alone (repeatable)
    #[arg(short, long = "volume", value_name = "[SOURCE:]TARGET[:OPTIONS]")]
    volumes: Vec<String>,
    #[arg(long, value_name = "TARGET[:OPTIONS]")]
    tmpfs: Vec<String>,
    /// [[IP:]HOST:]CONTAINER[/PROTOCOL] (repeatable)
    #[arg(short, long, value_name = "PORT")]
    publish: Vec<String>,
    /// Publish all ports that the image says it serves
    #[arg(short = 'P', long)]
    publish_all: bool,
    /// bridge, host, none, container:NAME, or a network's name
    #[arg(long, default_value = "")]
    network: String,
    #[arg(long = "network-alias", value_name = "NAME")]
    aliases: Vec<String>,
    #[arg(long, value_name = "ADDRESS", default_value = "")]
    ip: String,
    #[arg(long, default_value = "")]
    hostname: String,
    /// NAME:IP for its /etc/hosts (repeatable)
    #[arg(long = "add-host", value_name = "NAME:IP")]
    hosts: Vec<String>,
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<String>,
    #[arg(short, long, value_name = "USER[:GROUP]", default_value = "")]
    user: String,
    #[arg(short, long, value_name = "DIR", default_value = "")]
    workdir: String,
    #[arg(long)]
    entrypoint: Option<String>,
    /// no, always, unless-stopped, or on-failure[:N]
    #[arg(long, default_value = "no")]
    restart: String,
    /// Memory it may use, such as 512m
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<String>,
    /// CPUs it may use, such as 1.5
    #[arg(long)]
    cpus: Option<f64>,
    #[arg(long)]
    pids_limit: Option<i64>,
    #[arg(long, value_name = "SIZE")]
    shm_size: Option<String>,
    /// Run a small init as its first process
    #[arg(long)]
    init: bool,
    #[arg(long)]
    read_only: bool,
    /// All capabilities and devices
    #[arg(long)]
    privileged: bool,
    #[arg(long, value_name = "CAPABILITY")]
    cap_add: Vec<String>,
    #[arg(long, value_name = "CAPABILITY")]
    cap_drop: Vec<String>,
    /// no-new-privileges, seccomp=FILE|unconfined
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// HOST[:CONTAINER[:rwm]] (repeatable)
    #[arg(long = "device", value_name = "DEVICE")]
    devices: Vec<String>,
    /// host or container:NAME
    #[arg(long, default_value = "")]
    pid: String,
    #[arg(long, default_value = "")]
    stop_signal: String,
    /// missing, or never
    #[arg(long, default_value = "missing")]
    pub(crate) pull: String,
    pub(crate) image: String,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Variables as they are given, or as we have them; one that we do not have is left out.
pub(crate) fn environment(given: &[String]) -> Vec<String> {
    let one = |text: &String| {
        if text.contains('=') {
            return Some(text.clone());
        }
        std::env::var(text).ok().map(|value| format!("{text}={value}"))
    };
    given.iter().filter_map(one).collect()
}

/// The query and body of the request.
pub(crate) fn create_body(args: &CreateArgs) -> anyhow::Result<(String, Value)> {
    let mut env = Vec::new();
    for file in &args.env_files {
        let text = std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        env.extend(environment(&lines.map(str::to_owned).collect::<Vec<_>>()));
    }
    env.extend(environment(&args.env));
    let (bindings, exposed) = ports(&args.publish)?;
    let (mut binds, mut nameless) = (Vec::new(), Map::new());
    for volume in &args.volumes {
        if volume.contains(':') {
            binds.push(absolute(volume)?);
        } else {
            nameless.insert(volume.clone(), json!({}));
        }
    }
    let labels: Map<String, Value> = args
        .labels
        .iter()
        .map(|label| label.split_once('=').unwrap_or((label, "")))
        .map(|(key, value)| (key.to_owned(), json!(value)))
        .collect();
    let tmpfs: Map<String, Value> = args
        .tmpfs
        .iter()
        .map(|text| text.split_once(':').unwrap_or((text, "")))
        .map(|(target, options)| (target.to_owned(), json!(options)))
        .collect();
    let host_config = json!({
        "Binds": binds, "Tmpfs": tmpfs, "PortBindings": bindings, "PublishAllPorts": args.publish_all,
        "NetworkMode": args.network, "AutoRemove": args.rm, "RestartPolicy": restart_policy(&args.restart)?,
        "Memory": size(args.memory.as_deref())?, "NanoCpus": args.cpus.map_or(0, nano_cpus),
        "PidsLimit": args.pids_limit.unwrap_or(0), "ShmSize": size(args.shm_size.as_deref())?, "Init": args.init,
        "ReadonlyRootfs": args.read_only, "Privileged": args.privileged, "CapAdd": args.cap_add,
        "CapDrop": args.cap_drop, "SecurityOpt": security_options(&args.security_opt)?, "ExtraHosts": args.hosts,
        "Dns": args.dns, "PidMode": args.pid,
        "Devices": args.devices.iter().map(|text| device(text)).collect::<Vec<_>>(),
    });
    let mut body = json!({
        "Image": args.image, "Env": env, "Labels": labels, "Hostname": args.hostname, "User": args.user,
        "WorkingDir": args.workdir, "Tty": args.tty, "OpenStdin": args.interactive, "StdinOnce": args.interactive,
        "AttachStdin": args.interactive, "StopSignal": args.stop_signal, "ExposedPorts": exposed,
        "Volumes": nameless, "HostConfig": host_config,
    });
    if !args.command.is_empty() {
        body["Cmd"] = json!(args.command);
    }
    if let Some(entrypoint) = &args.entrypoint {
        body["Entrypoint"] = json!([entrypoint]);
    }
    if !args.aliases.is_empty() || !args.ip.is_empty() {
        body["NetworkingConfig"] = json!({"EndpointsConfig": {&args.network: {
            "Aliases": args.aliases, "IPAMConfig": {"IPv4Address": args.ip},
        }}});
    }
    Ok((format!("name={}", escape(&args.name)), body))
}

fn restart_policy(text: &str) -> anyhow::Result<Value> {
    let (name, count) = text.split_once(':').unwrap_or((text, "0"));
    let count: u32 = count.parse().with_context(|| format!("restart policy {text:?}: {count:?} is no number"))?;
    Ok(json!({"Name": name, "MaximumRetryCount": count}))
}

fn size(text: Option<&str>) -> anyhow::Result<u64> {
    let Some(text) = text else { return Ok(0) };
    skep_engine::parse_size(text).with_context(|| format!("{text:?} is no size: write 512m, 2g or bytes"))
}

/// Billionths of a CPU.
#[expect(clippy::cast_possible_truncation, reason = "a number of CPUs is small")]
fn nano_cpus(cpus: f64) -> i64 {
    (cpus * 1e9) as i64
}

fn security_options(options: &[String]) -> anyhow::Result<Vec<String>> {
    let one = |option: &String| match option.split_once('=') {
        // The daemon is given the profile itself: it may not see the file.
        Some(("seccomp", path)) if !matches!(path, "unconfined" | "builtin") => {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("seccomp profile {path} cannot be read"))?;
            Ok(format!("seccomp={text}"))
        }
        _ => Ok(option.clone()),
    };
    options.iter().map(one).collect()
}

fn device(text: &str) -> Value {
    let mut parts = text.split(':');
    let host = parts.next().unwrap_or_default();
    json!({"PathOnHost": host, "PathInContainer": parts.next().unwrap_or(host),
        "CgroupPermissions": parts.next().unwrap_or("rwm")})
}

/// A path that is relative to us is made absolute; a volume's name has no slash.
fn absolute(volume: &str) -> anyhow::Result<String> {
    match volume.split_once(':') {
        Some((source, rest)) if source.starts_with('.') => {
            let path = std::fs::canonicalize(source).with_context(|| format!("{source} is not there"))?;
            Ok(format!("{}:{rest}", path.display()))
        }
        _ => Ok(volume.to_owned()),
    }
}

/// Reads `[[IP:]HOST:]CONTAINER[/PROTOCOL]`, with ranges on both sides.
fn ports(publish: &[String]) -> anyhow::Result<(Map<String, Value>, Map<String, Value>)> {
    let (mut bindings, mut exposed) = (Map::new(), Map::new());
    for text in publish {
        let wrong = || format!("port {text:?} cannot be read: write [[IP:]HOST:]CONTAINER[/PROTOCOL]");
        let (numbers, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let parts: Vec<&str> = numbers.rsplitn(3, ':').collect();
        let (container, host, ip) = match parts.as_slice() {
            [container] => (*container, "", ""),
            [container, host] => (*container, *host, ""),
            [container, host, ip] => (*container, *host, ip.trim_matches(['[', ']'])),
            _ => anyhow::bail!(wrong()),
        };
        let containers = range(container).with_context(wrong)?;
        let hosts = if host.is_empty() { None } else { Some(range(host).with_context(wrong)?) };
        anyhow::ensure!(hosts.as_ref().is_none_or(|hosts| hosts.len() == containers.len()), wrong());
        for (at, port) in containers.enumerate() {
            let key = format!("{port}/{protocol}");
            let number = hosts.as_ref().and_then(|hosts| hosts.clone().nth(at)).map(|port| port.to_string());
            let binding = json!({"HostIp": ip, "HostPort": number.unwrap_or_default()});
            exposed.insert(key.clone(), json!({}));
            if let Value::Array(list) = bindings.entry(key).or_insert_with(|| json!([])) {
                list.push(binding);
            }
        }
    }
    Ok((bindings, exposed))
}

fn range(text: &str) -> anyhow::Result<std::ops::Range<u32>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (u16, u16) = (first.parse()?, last.parse()?);
    anyhow::ensure!(first > 0 && first <= last, "{text} is no range of ports");
    Ok(u32::from(first)..u32::from(last) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: &str) {
        let got = ports(&[text.to_owned()])
            .map_or_else(|error| format!("{error:#}"), |(bindings, _)| Value::Object(bindings).to_string());
        assert!(got.contains(want), "{got} should say {want}");
    }

    #[test]
    fn ports_are_read_as_the_docker_client_reads_them() {
        check("80", r#"{"80/tcp":[{"HostIp":"","HostPort":""}]}"#);
        check("8080:80/udp", r#"{"80/udp":[{"HostIp":"","HostPort":"8080"}]}"#);
        check("127.0.0.1:8080:80", r#""HostIp":"127.0.0.1","HostPort":"8080""#);
        check("9000-9001:80-81", r#""81/tcp":[{"HostIp":"","HostPort":"9001"}]"#);
        check("9000-9002:80-81", "cannot be read");
        check("web:80", "cannot be read");
    }

    #[test]
    fn sizes_and_policies_are_read_or_refused() {
        assert_eq!(size(Some("64m")).unwrap(), 64 << 20);
        assert!(size(Some("much")).is_err());
        assert_eq!(restart_policy("on-failure:3").unwrap()["MaximumRetryCount"], 3);
        assert!(restart_policy("on-failure:x").is_err());
    }
}
