//! The flags of `service create` and `service update` that say what a service is.

use serde_json::{Value, json};

use crate::client::Client;

#[derive(clap::Args)]
#[command(trailing_var_arg = true)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    pub(super) spec: SpecArgs,
    #[arg(long)]
    pub(super) name: String,
    pub(super) image: String,
    /// Command line, or arguments of the image's entrypoint
    #[arg(allow_hyphen_values = true)]
    pub(super) args: Vec<String>,
}

/// What create and update share. On an update, lists are added to.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct SpecArgs {
    /// Return at once instead of waiting until the service is as declared
    #[arg(short, long)]
    pub(super) detach: bool,
    /// Show no progress
    #[arg(short, long)]
    pub(super) quiet: bool,
    #[arg(long)]
    replicas: Option<u64>,
    /// replicated or global
    #[arg(long)]
    mode: Option<String>,
    #[arg(short, long = "env", visible_alias = "env-add", value_name = "NAME=VALUE")]
    env: Vec<String>,
    #[arg(short, long = "label", visible_alias = "label-add", value_name = "KEY=VALUE")]
    label: Vec<String>,
    #[arg(long, value_name = "KEY=VALUE")]
    container_label: Vec<String>,
    /// NAME, or source=NAME,target=PATH,uid=N,gid=N,mode=0400
    #[arg(long = "secret", visible_alias = "secret-add", value_name = "SECRET")]
    secret: Vec<String>,
    /// NAME, or source=NAME,target=PATH,uid=N,gid=N,mode=0444
    #[arg(long = "config", visible_alias = "config-add", value_name = "CONFIG")]
    config: Vec<String>,
    /// type=bind|volume|tmpfs,source=…,target=…[,readonly]
    #[arg(long = "mount", visible_alias = "mount-add", value_name = "MOUNT")]
    mount: Vec<String>,
    /// [[IP:]PUBLISHED:]PORT[/udp] on every node, or target=PORT[,published=[IP:]PORT][,protocol=tcp|udp][,mode=host]
    #[arg(short, long = "publish", visible_alias = "publish-add", value_name = "PORT")]
    publish: Vec<String>,
    /// NAME, or name=NAME[,alias=NAME]
    #[arg(long = "network", visible_alias = "network-add", value_name = "NETWORK")]
    network: Vec<String>,
    /// vip (one address for the service) or dnsrr (its tasks' addresses)
    #[arg(long, value_name = "MODE")]
    endpoint_mode: Option<String>,
    /// Such as node.labels.zone==a
    #[arg(long = "constraint", visible_alias = "constraint-add", value_name = "CONSTRAINT")]
    constraint: Vec<String>,
    /// spread=node.labels.KEY
    #[arg(long = "placement-pref", visible_alias = "placement-pref-add", value_name = "PREF")]
    placement_pref: Vec<String>,
    #[arg(long, value_name = "N")]
    replicas_max_per_node: Option<u64>,
    #[arg(long, value_name = "CPUS")]
    limit_cpu: Option<f64>,
    #[arg(long, value_name = "BYTES")]
    limit_memory: Option<String>,
    #[arg(long, value_name = "N")]
    limit_pids: Option<i64>,
    #[arg(long, value_name = "CPUS")]
    reserve_cpu: Option<f64>,
    #[arg(long, value_name = "BYTES")]
    reserve_memory: Option<String>,
    /// none, on-failure or any
    #[arg(long)]
    restart_condition: Option<String>,
    #[arg(long, value_name = "TIME")]
    restart_delay: Option<String>,
    #[arg(long, value_name = "N")]
    restart_max_attempts: Option<u64>,
    #[arg(long, value_name = "TIME")]
    restart_window: Option<String>,
    #[command(flatten)]
    update: UpdateFlags,
    #[command(flatten)]
    rollback: RollbackFlags,
    #[arg(long, value_name = "COMMAND")]
    health_cmd: Option<String>,
    #[arg(long, value_name = "TIME")]
    health_interval: Option<String>,
    #[arg(long, value_name = "TIME")]
    health_timeout: Option<String>,
    #[arg(long, value_name = "N")]
    health_retries: Option<u64>,
    #[arg(long, value_name = "TIME")]
    health_start_period: Option<String>,
    #[arg(long)]
    no_healthcheck: bool,
    #[arg(long)]
    hostname: Option<String>,
    #[arg(short, long)]
    user: Option<String>,
    #[arg(long, value_name = "GROUP")]
    group: Vec<String>,
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    #[arg(long, value_name = "COMMAND")]
    entrypoint: Option<String>,
    #[arg(long)]
    init: bool,
    #[arg(long)]
    read_only: bool,
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<String>,
    #[arg(long, value_name = "TIME")]
    stop_grace_period: Option<String>,
    #[arg(long, value_name = "CAP")]
    cap_add: Vec<String>,
    #[arg(long, value_name = "CAP")]
    cap_drop: Vec<String>,
    #[arg(long, value_name = "NAME=VALUE")]
    sysctl: Vec<String>,
    /// NAME=SOFT[:HARD]
    #[arg(long, value_name = "ULIMIT")]
    ulimit: Vec<String>,
    #[arg(long = "host", id = "extra_host", value_name = "NAME:IP")]
    extra_host: Vec<String>,
    #[arg(long, value_name = "IP")]
    dns: Vec<String>,
    #[arg(long)]
    log_driver: Option<String>,
    #[arg(long, value_name = "NAME=VALUE")]
    log_opt: Vec<String>,
}

#[derive(Clone, Debug, Default, clap::Args)]
struct UpdateFlags {
    #[arg(long, value_name = "N")]
    update_parallelism: Option<u64>,
    #[arg(long, value_name = "TIME")]
    update_delay: Option<String>,
    /// pause, continue or rollback
    #[arg(long, value_name = "ACTION")]
    update_failure_action: Option<String>,
    #[arg(long, value_name = "TIME")]
    update_monitor: Option<String>,
    #[arg(long, value_name = "RATIO")]
    update_max_failure_ratio: Option<f64>,
    /// stop-first or start-first
    #[arg(long, value_name = "ORDER")]
    update_order: Option<String>,
}

#[derive(Clone, Debug, Default, clap::Args)]
struct RollbackFlags {
    #[arg(long, value_name = "N")]
    rollback_parallelism: Option<u64>,
    #[arg(long, value_name = "TIME")]
    rollback_delay: Option<String>,
    /// pause or continue
    #[arg(long, value_name = "ACTION")]
    rollback_failure_action: Option<String>,
    #[arg(long, value_name = "TIME")]
    rollback_monitor: Option<String>,
    #[arg(long, value_name = "RATIO")]
    rollback_max_failure_ratio: Option<f64>,
    /// stop-first or start-first
    #[arg(long, value_name = "ORDER")]
    rollback_order: Option<String>,
}

/// How tasks are renewed, as the flags say; `None` if they say nothing.
struct Renewal<'a> {
    parallelism: Option<u64>,
    delay: Option<&'a String>,
    action: Option<&'a String>,
    monitor: Option<&'a String>,
    ratio: Option<f64>,
    order: Option<&'a String>,
}

impl Renewal<'_> {
    fn apply(&self, config: &mut Value) -> anyhow::Result<()> {
        let mut set = serde_json::Map::new();
        put(&mut set, "Parallelism", self.parallelism.map(|n| json!(n)));
        put(&mut set, "Delay", self.delay.map(|t| duration(t)).transpose()?.map(|n| json!(n)));
        put(&mut set, "FailureAction", self.action.map(|t| json!(t)));
        put(&mut set, "Monitor", self.monitor.map(|t| duration(t)).transpose()?.map(|n| json!(n)));
        put(&mut set, "MaxFailureRatio", self.ratio.map(|n| json!(n)));
        put(&mut set, "Order", self.order.map(|t| json!(t)));
        if !set.is_empty() && config.is_null() {
            // A config that is sent must say all: absent parallelism would mean "all at once".
            *config = json!({"Parallelism": 1});
        }
        for (key, value) in set {
            config[key] = value;
        }
        Ok(())
    }
}

fn put(map: &mut serde_json::Map<String, Value>, key: &str, value: Option<Value>) {
    if let Some(value) = value {
        map.insert(key.to_owned(), value);
    }
}

impl SpecArgs {
    /// Writes what the flags say into a spec.
    pub(super) async fn apply(&self, client: &Client, spec: &mut Value) -> anyhow::Result<()> {
        match (self.mode.as_deref(), self.replicas) {
            (Some("global"), None) => spec["Mode"] = json!({"Global": {}}),
            (Some("global"), Some(_)) => anyhow::bail!("replicas can only be used with replicated mode"),
            (Some("replicated"), None) => spec["Mode"] = json!({"Replicated": {}}),
            (None | Some("replicated"), Some(replicas)) => spec["Mode"] = json!({"Replicated": {"Replicas": replicas}}),
            (None, None) => {}
            (Some(other), _) => anyhow::bail!("mode {other:?} is not supported: use replicated or global"),
        }
        add_pairs(&mut spec["Labels"], &self.label);
        self.renewals(spec)?;
        for text in &self.publish {
            let port = publish(text)?;
            push(&mut spec["EndpointSpec"]["Ports"], port);
        }
        if let Some(mode) = &self.endpoint_mode {
            spec["EndpointSpec"]["Mode"] = json!(mode);
        }
        for text in &self.network {
            let network = attachment(client, text).await?;
            push(&mut spec["TaskTemplate"]["Networks"], network);
        }
        self.apply_task(&mut spec["TaskTemplate"])?;
        for (flag, kind, list) in [("secret", "secrets", &self.secret), ("config", "configs", &self.config)] {
            for text in list {
                let reference = reference(client, flag, kind, text).await?;
                let member = if flag == "secret" { "Secrets" } else { "Configs" };
                push(&mut spec["TaskTemplate"]["ContainerSpec"][member], reference);
            }
        }
        Ok(())
    }

    fn renewals(&self, spec: &mut Value) -> anyhow::Result<()> {
        let (update, rollback) = (&self.update, &self.rollback);
        Renewal {
            parallelism: update.update_parallelism,
            delay: update.update_delay.as_ref(),
            action: update.update_failure_action.as_ref(),
            monitor: update.update_monitor.as_ref(),
            ratio: update.update_max_failure_ratio,
            order: update.update_order.as_ref(),
        }
        .apply(&mut spec["UpdateConfig"])?;
        Renewal {
            parallelism: rollback.rollback_parallelism,
            delay: rollback.rollback_delay.as_ref(),
            action: rollback.rollback_failure_action.as_ref(),
            monitor: rollback.rollback_monitor.as_ref(),
            ratio: rollback.rollback_max_failure_ratio,
            order: rollback.rollback_order.as_ref(),
        }
        .apply(&mut spec["RollbackConfig"])
    }

    fn apply_task(&self, task: &mut Value) -> anyhow::Result<()> {
        for constraint in &self.constraint {
            push(&mut task["Placement"]["Constraints"], json!(constraint));
        }
        for text in &self.placement_pref {
            let descriptor = text.strip_prefix("spread=").ok_or_else(|| {
                anyhow::anyhow!("placement-pref {text:?} cannot be read: write spread=node.labels.KEY")
            })?;
            push(&mut task["Placement"]["Preferences"], json!({"Spread": {"SpreadDescriptor": descriptor}}));
        }
        if let Some(max) = self.replicas_max_per_node {
            task["Placement"]["MaxReplicas"] = json!(max);
        }
        self.apply_resources(task)?;
        let restart = [
            ("Condition", self.restart_condition.as_ref().map(|t| json!(t))),
            ("Delay", self.restart_delay.as_ref().map(|t| duration(t)).transpose()?.map(|n| json!(n))),
            ("MaxAttempts", self.restart_max_attempts.map(|n| json!(n))),
            ("Window", self.restart_window.as_ref().map(|t| duration(t)).transpose()?.map(|n| json!(n))),
        ];
        for (member, value) in restart {
            if let Some(value) = value {
                task["RestartPolicy"][member] = value;
            }
        }
        if let Some(driver) = &self.log_driver {
            task["LogDriver"]["Name"] = json!(driver);
        }
        if !self.log_opt.is_empty() {
            add_pairs(&mut task["LogDriver"]["Options"], &self.log_opt);
        }
        self.apply_container(&mut task["ContainerSpec"])
    }

    fn apply_resources(&self, task: &mut Value) -> anyhow::Result<()> {
        #[expect(clippy::cast_possible_truncation, reason = "CPUs are few")]
        let cpus = |cpus: f64| json!((cpus * 1e9).round() as i64);
        let size = |text: &String| {
            let bytes =
                skep_engine::parse_size(text).ok_or_else(|| anyhow::anyhow!("{text:?} is no size such as 512m"))?;
            anyhow::Ok(json!(bytes))
        };
        for (pointer, member, value) in [
            ("Limits", "NanoCPUs", self.limit_cpu.map(cpus)),
            ("Limits", "MemoryBytes", self.limit_memory.as_ref().map(size).transpose()?),
            ("Limits", "Pids", self.limit_pids.map(|n| json!(n))),
            ("Reservations", "NanoCPUs", self.reserve_cpu.map(cpus)),
            ("Reservations", "MemoryBytes", self.reserve_memory.as_ref().map(size).transpose()?),
        ] {
            if let Some(value) = value {
                task["Resources"][pointer][member] = value;
            }
        }
        Ok(())
    }

    fn apply_container(&self, container: &mut Value) -> anyhow::Result<()> {
        for var in &self.env {
            let name = var.split('=').next().unwrap_or(var);
            if let Some(list) = container["Env"].as_array_mut() {
                list.retain(|old| old.as_str().and_then(|old| old.split('=').next()) != Some(name));
            }
            // NAME alone takes the value of the client's environment.
            let value = if var.contains('=') {
                var.clone()
            } else {
                format!("{var}={}", std::env::var(var).unwrap_or_default())
            };
            push(&mut container["Env"], json!(value));
        }
        add_pairs(&mut container["Labels"], &self.container_label);
        add_pairs(&mut container["Sysctls"], &self.sysctl);
        for mount in &self.mount {
            push(&mut container["Mounts"], parse_mount(mount)?);
        }
        for (member, list) in
            [("CapabilityAdd", &self.cap_add), ("CapabilityDrop", &self.cap_drop), ("Groups", &self.group)]
        {
            list.iter().for_each(|value| push(&mut container[member], json!(value)));
        }
        for text in &self.ulimit {
            push(&mut container["Ulimits"], parse_ulimit(text)?);
        }
        for text in &self.extra_host {
            let (name, ip) =
                text.split_once(':').ok_or_else(|| anyhow::anyhow!("host {text:?} cannot be read: write NAME:IP"))?;
            push(&mut container["Hosts"], json!(format!("{ip} {name}")));
        }
        self.dns.iter().for_each(|server| push(&mut container["DNSConfig"]["Nameservers"], json!(server)));
        let words = |text: &String| json!(text.split_whitespace().collect::<Vec<_>>());
        for (member, value) in [
            ("Hostname", self.hostname.as_ref().map(|t| json!(t))),
            ("User", self.user.as_ref().map(|t| json!(t))),
            ("Dir", self.workdir.as_ref().map(|t| json!(t))),
            ("Command", self.entrypoint.as_ref().map(words)),
            ("Init", self.init.then(|| json!(true))),
            ("ReadOnly", self.read_only.then(|| json!(true))),
            ("StopSignal", self.stop_signal.as_ref().map(|t| json!(t))),
            ("StopGracePeriod", self.stop_grace_period.as_ref().map(|t| duration(t)).transpose()?.map(|n| json!(n))),
        ] {
            if let Some(value) = value {
                container[member] = value;
            }
        }
        self.apply_health(container)
    }

    fn apply_health(&self, container: &mut Value) -> anyhow::Result<()> {
        if self.no_healthcheck {
            container["Healthcheck"] = json!({"Test": ["NONE"]});
            return Ok(());
        }
        let time = |text: &Option<String>| text.as_ref().map(|t| duration(t)).transpose().map(|n| n.map(|n| json!(n)));
        for (member, value) in [
            ("Test", self.health_cmd.as_ref().map(|command| json!(["CMD-SHELL", command]))),
            ("Interval", time(&self.health_interval)?),
            ("Timeout", time(&self.health_timeout)?),
            ("Retries", self.health_retries.map(|n| json!(n))),
            ("StartPeriod", time(&self.health_start_period)?),
        ] {
            if let Some(value) = value {
                container["Healthcheck"][member] = value;
            }
        }
        Ok(())
    }
}

fn push(list: &mut Value, value: Value) {
    if let Some(list) = list.as_array_mut() {
        list.push(value);
    } else {
        *list = json!([value]);
    }
}

fn add_pairs(map: &mut Value, pairs: &[String]) {
    for pair in pairs {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        map[key] = json!(value);
    }
}

/// Nanoseconds of `1h30m`, `500ms`, `10s`.
pub(crate) fn duration(text: &str) -> anyhow::Result<i64> {
    let wrong = || anyhow::anyhow!("{text:?} is no time: write 500ms, 10s, 5m or 1h30m");
    let mut total = 0f64;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let number: f64 = rest[..digits].parse().map_err(|_| wrong())?;
        let unit_len = rest[digits..].find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len() - digits);
        let unit = match &rest[digits..digits + unit_len] {
            "ns" => 1.0,
            "us" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return Err(wrong()),
        };
        total += number * unit;
        rest = &rest[digits + unit_len..];
    }
    if text.is_empty() {
        return Err(wrong());
    }
    #[expect(clippy::cast_possible_truncation, reason = "a time of years fits")]
    Ok(total.round() as i64)
}

fn fields(text: &str) -> std::collections::BTreeMap<&str, &str> {
    text.split(',').map(|part| part.split_once('=').unwrap_or((part, "true"))).collect()
}

fn publish(text: &str) -> anyhow::Result<Value> {
    let wrong =
        || anyhow::anyhow!("publish {text:?} cannot be read: write 8080:80, or target=80,published=8080,mode=host");
    let number = |text: &str| text.parse::<u16>().map_err(|_| wrong());
    if !text.contains('=') {
        // The short form publishes through the routing mesh.
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let (published, target) = ports.rsplit_once(':').unwrap_or(("0", ports));
        let mut port = json!({"Protocol": protocol, "TargetPort": number(target)?, "PublishMode": "ingress"});
        set_published(&mut port, published).ok_or_else(wrong)?;
        return Ok(port);
    }
    let fields = fields(text);
    let target = number(fields.get("target").ok_or_else(wrong)?)?;
    let mut port = json!({
        "Protocol": fields.get("protocol").unwrap_or(&"tcp"), "TargetPort": target,
        "PublishMode": fields.get("mode").unwrap_or(&"ingress"),
    });
    set_published(&mut port, fields.get("published").unwrap_or(&"0")).ok_or_else(wrong)?;
    Ok(port)
}

/// Reads `8080` or `127.0.0.1:8080`.
fn set_published(port: &mut Value, text: &str) -> Option<()> {
    let number = match text.rsplit_once(':') {
        Some((address, number)) => {
            port["HostIP"] = json!(address.parse::<std::net::Ipv4Addr>().ok()?);
            number
        }
        None => text,
    };
    port["PublishedPort"] = json!(number.parse::<u16>().ok()?);
    Some(())
}

/// A network by its name; the daemon knows ids.
async fn attachment(client: &Client, text: &str) -> anyhow::Result<Value> {
    let mut network = json!({});
    let mut name = text;
    if text.contains('=') {
        name = "";
        for (key, value) in text.split(',').filter_map(|part| part.split_once('=')) {
            match key {
                "name" => name = value,
                "alias" => push(&mut network["Aliases"], json!(value)),
                "driver-opt" => add_pairs(&mut network["DriverOpts"], &[value.to_owned()]),
                other => anyhow::bail!("network {text:?}: {other:?} is not known; use name, alias or driver-opt"),
            }
        }
        anyhow::ensure!(!name.is_empty(), "network {text:?} names none: write name=NETWORK,alias=NAME");
    }
    let found = client.get(&format!("/networks/{}?scope=swarm", crate::client::escape(name))).await?;
    network["Target"] = found["Id"].clone();
    Ok(network)
}

fn parse_mount(text: &str) -> anyhow::Result<Value> {
    let fields = fields(text);
    let first = |names: &[&str]| names.iter().find_map(|name| fields.get(name)).copied();
    let target = first(&["target", "dst", "destination"])
        .ok_or_else(|| anyhow::anyhow!("mount {text:?} has no target: write type=volume,source=data,target=/data"))?;
    let mut mount = json!({
        "Type": first(&["type"]).unwrap_or("volume"), "Source": first(&["source", "src"]).unwrap_or_default(),
        "Target": target, "ReadOnly": first(&["readonly", "ro"]).is_some_and(|value| value != "false"),
    });
    if let Some(size) = first(&["tmpfs-size"]) {
        let bytes = skep_engine::parse_size(size).ok_or_else(|| anyhow::anyhow!("tmpfs-size {size:?} is no size"))?;
        mount["TmpfsOptions"]["SizeBytes"] = json!(bytes);
    }
    if let Some(mode) = first(&["tmpfs-mode"]) {
        mount["TmpfsOptions"]["Mode"] = json!(u32::from_str_radix(mode, 8)?);
    }
    if let Some(propagation) = first(&["bind-propagation"]) {
        mount["BindOptions"]["Propagation"] = json!(propagation);
    }
    Ok(mount)
}

fn parse_ulimit(text: &str) -> anyhow::Result<Value> {
    let wrong = || anyhow::anyhow!("ulimit {text:?} cannot be read: write nofile=1024:2048");
    let (name, limits) = text.split_once('=').ok_or_else(wrong)?;
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let (soft, hard): (i64, i64) = (soft.parse().map_err(|_| wrong())?, hard.parse().map_err(|_| wrong())?);
    Ok(json!({"Name": name, "Soft": soft, "Hard": hard}))
}

/// A reference to a secret or config by its name; the daemon knows ids alone.
async fn reference(client: &Client, flag: &str, kind: &str, text: &str) -> anyhow::Result<Value> {
    let fields = if text.contains('=') { fields(text) } else { [("source", text)].into() };
    let first = |names: &[&str]| names.iter().find_map(|name| fields.get(name)).copied();
    let name = first(&["source", "src"]).ok_or_else(|| anyhow::anyhow!("{flag} {text:?} names no source"))?;
    let found = client.get(&format!("/{kind}/{name}")).await?;
    let default_target = if flag == "config" { format!("/{name}") } else { name.to_owned() };
    let target = first(&["target", "dst", "destination"]).map_or(default_target, str::to_owned);
    let mode = u32::from_str_radix(first(&["mode"]).unwrap_or("0444"), 8)
        .map_err(|_| anyhow::anyhow!("{flag} {text:?}: mode is an octal number such as 0400"))?;
    let file = json!({
        "Name": target, "UID": first(&["uid"]).unwrap_or("0"), "GID": first(&["gid"]).unwrap_or("0"), "Mode": mode,
    });
    Ok(if flag == "secret" {
        json!({"File": file, "SecretID": found["ID"], "SecretName": name})
    } else {
        json!({"File": file, "ConfigID": found["ID"], "ConfigName": name})
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_go_reads_them() {
        for (text, want) in [("500ms", 500_000_000), ("1h30m", 5_400_000_000_000), ("1.5s", 1_500_000_000)] {
            assert_eq!(duration(text).unwrap(), want, "{text}");
        }
        for text in ["", "5", "x", "5 s", "-1s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ports_and_mounts_are_read() {
        assert_eq!(publish("mode=host,target=80,published=8080").unwrap()["PublishMode"], "host");
        assert_eq!(publish("8080:80/udp").unwrap()["Protocol"], "udp");
        let local = publish("127.0.0.1:8080:80").unwrap();
        assert_eq!((local["HostIP"].as_str(), local["PublishedPort"].as_u64()), (Some("127.0.0.1"), Some(8080)));
        assert_eq!(publish("target=80,published=127.0.0.1:8080").unwrap()["HostIP"], "127.0.0.1");
        for wrong in ["web", "x:80", "1.2.3:80:80", "published=80"] {
            assert!(publish(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse_mount("type=tmpfs,dst=/t,tmpfs-size=1m").unwrap()["TmpfsOptions"]["SizeBytes"], 1 << 20);
        assert!(parse_mount("type=volume").is_err());
    }
}
