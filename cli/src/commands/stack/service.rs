//! One service of a compose file.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::document::{Field, Keys, Kind};
use super::mounts;
use super::project::{DEFAULT_NETWORK, Declared, PREDEFINED_NETWORKS};
use crate::commands::service::MODES;
use crate::commands::values::{duration, file_lines, size};

/// Keys that mean something where one host is all there is.
const OF_ONE_HOST: [&str; 17] = [
    "build",
    "cgroup_parent",
    "cgroupns_mode",
    "container_name",
    "devices",
    "domainname",
    "expose",
    "external_links",
    "ipc",
    "links",
    "mac_address",
    "network_mode",
    "pid",
    "privileged",
    "security_opt",
    "shm_size",
    "userns_mode",
];
/// The image as the file names it: what the spec names may have got its digest.
pub(super) const IMAGE_LABEL: &str = "com.docker.stack.image";

#[derive(Debug)]
pub(super) struct Service {
    /// In the swarm.
    pub(super) name: String,
    pub(super) image: String,
    /// Networks, secrets and configs are in it by their names.
    pub(super) spec: Value,
}

impl Service {
    /// The names of its networks.
    pub(super) fn networks(&self) -> impl Iterator<Item = &str> {
        let networks = self.spec["TaskTemplate"]["Networks"].as_array().into_iter().flatten();
        networks.filter_map(|network| network["Target"].as_str())
    }

    pub(super) fn mounts(&self) -> impl Iterator<Item = &Value> {
        self.spec["TaskTemplate"]["ContainerSpec"]["Mounts"].as_array().into_iter().flatten()
    }
}

pub(super) fn read(
    declared: &Declared<'_>,
    key: &str,
    field: &Field<'_>,
    ignored: &mut BTreeSet<String>,
) -> anyhow::Result<Service> {
    let mut keys = field.keys()?;
    ignored.extend(OF_ONE_HOST.into_iter().filter(|key| keys.ignore(key)).map(str::to_owned));
    // Who waits for whom is left to the programs, which are restarted until they find each other.
    keys.ignore("depends_on");
    let name = format!("{}_{key}", declared.stack);
    let image = keys.text("image")?.filter(|image| !image.is_empty());
    let image = image.ok_or_else(|| field.wrong("it names no image: a swarm builds none, push one to a registry"))?;
    let mut spec = json!({"Name": name, "TaskTemplate": {"ContainerSpec": {"Image": image}}, "EndpointSpec": {}});
    let mut deploy = BTreeMap::new();
    let restart = keys.take("restart");
    let deployed = keys.take("deploy");
    if let Some(deployed) = &deployed {
        let mut keys = deployed.keys()?;
        deploy = keys.labels("labels")?;
        deployment(&mut spec, keys)?;
    }
    if let Some(restart) = restart
        && spec["TaskTemplate"].get("RestartPolicy").is_none()
    {
        spec["TaskTemplate"]["RestartPolicy"] = restart_policy(&restart)?;
    }
    deploy.insert(IMAGE_LABEL.to_owned(), image.clone());
    spec["Labels"] = declared.labelled(deploy);
    let ports = keys.take("ports").map_or(Ok(Vec::new()), |list| list.items())?;
    let mut ports: Vec<Value> = ports.iter().map(ports_of).collect::<anyhow::Result<Vec<_>>>()?.concat();
    ports.sort_by_key(|port| port["PublishedPort"].as_u64());
    if !ports.is_empty() {
        spec["EndpointSpec"]["Ports"] = json!(ports);
    }
    let task = &mut spec["TaskTemplate"];
    task["Networks"] = networks(declared, key, keys.take("networks").as_ref())?;
    if let Some(logging) = keys.take("logging") {
        let mut keys = logging.keys()?;
        task["LogDriver"] =
            json!({"Name": keys.text("driver")?.unwrap_or_default(), "Options": keys.labels("options")?});
        keys.finish()?;
    }
    container(declared, &mut task["ContainerSpec"], &mut keys)?;
    keys.finish()?;
    Ok(Service { name, image, spec })
}

/// Writes down what is said of the container itself.
fn container(declared: &Declared<'_>, container: &mut Value, keys: &mut Keys<'_>) -> anyhow::Result<()> {
    for (key, member) in [
        ("hostname", "Hostname"),
        ("user", "User"),
        ("working_dir", "Dir"),
        ("stop_signal", "StopSignal"),
        ("isolation", "Isolation"),
    ] {
        put(container, member, keys.text(key)?);
    }
    for (key, member) in [("init", "Init"), ("read_only", "ReadOnly"), ("stdin_open", "OpenStdin"), ("tty", "TTY")] {
        put(container, member, keys.take(key).map(|field| field.flag()).transpose()?);
    }
    for (key, member) in [("entrypoint", "Command"), ("command", "Args")] {
        put(container, member, keys.take(key).map(|field| command(&field)).transpose()?);
    }
    put(container, "StopGracePeriod", time(keys, "stop_grace_period")?);
    put(container, "OomScoreAdj", keys.take("oom_score_adj").map(|field| field.number::<i64>()).transpose()?);
    put(container, "Healthcheck", keys.take("healthcheck").map(|field| health(&field)).transpose()?);
    container["Labels"] = declared.labelled(keys.labels("labels")?);
    let env = environment(declared, keys)?;
    put(container, "Env", Some(env).filter(|env| !env.is_empty()));
    let sysctls = keys.labels("sysctls")?;
    put(container, "Sysctls", Some(sysctls).filter(|sysctls| !sysctls.is_empty()));
    for (key, member) in [("cap_add", "CapabilityAdd"), ("cap_drop", "CapabilityDrop")] {
        let list = keys.take(key).map(|field| field.texts()).transpose()?.unwrap_or_default();
        let names: BTreeSet<String> = list.iter().map(|name| capability(name)).collect();
        put(container, member, Some(names).filter(|names| !names.is_empty()));
    }
    put(container, "Groups", keys.take("group_add").map(|field| field.texts()).transpose()?);
    for (key, member) in [("dns", "Nameservers"), ("dns_search", "Search"), ("dns_opt", "Options")] {
        if let Some(list) = keys.take(key) {
            container["DNSConfig"][member] = json!(list.texts()?);
        }
    }
    put(container, "Hosts", keys.take("extra_hosts").map(|field| hosts(&field)).transpose()?);
    put(container, "Ulimits", keys.take("ulimits").map(|field| ulimits(&field)).transpose()?);
    if let Some(from) = keys.take("credential_spec") {
        return Err(from.wrong("credentials of Windows are of no use here: take it out"));
    }
    let mounts = mounts::read(declared, keys)?;
    put(container, "Mounts", Some(mounts).filter(|mounts| !mounts.is_empty()));
    for (key, member, id, known) in
        [("secrets", "Secrets", "Secret", &declared.secrets), ("configs", "Configs", "Config", &declared.configs)]
    {
        let list = keys.take(key).map_or(Ok(Vec::new()), |list| list.items())?;
        let mut references =
            list.iter().map(|field| reference(field, id, known)).collect::<anyhow::Result<Vec<_>>>()?;
        references.sort_by_key(|reference| reference[format!("{id}Name")].as_str().map(str::to_owned));
        put(container, member, Some(references).filter(|references| !references.is_empty()));
    }
    Ok(())
}

/// Writes a member that is there.
fn put<T: serde::Serialize>(value: &mut Value, member: &str, given: Option<T>) {
    if let Some(given) = given {
        value[member] = json!(given);
    }
}

fn time(keys: &mut Keys<'_>, key: &str) -> anyhow::Result<Option<i64>> {
    keys.take(key).map(|field| field.at(duration(&field.text()?))).transpose()
}

/// A command line: a list, or a text as a shell would split it.
fn command(field: &Field<'_>) -> anyhow::Result<Vec<String>> {
    match &field.node.kind {
        Kind::Scalar(_) => field.at(crate::commands::values::words(&field.text()?)),
        Kind::List(_) | Kind::Map(_) => field.texts(),
    }
}

/// Variables: those of files, then those that are given; one without a value has ours.
fn environment(declared: &Declared<'_>, keys: &mut Keys<'_>) -> anyhow::Result<Vec<String>> {
    let mut all = BTreeMap::new();
    let files = keys.take("env_file");
    let one_or_many = files.iter().map(|field| match &field.node.kind {
        Kind::List(_) => field.items(),
        Kind::Scalar(_) | Kind::Map(_) => Ok(vec![field.clone()]),
    });
    for field in one_or_many.collect::<anyhow::Result<Vec<_>>>()?.concat() {
        let (path, is_required) = match &field.node.kind {
            Kind::Map(_) => {
                let mut keys = field.keys()?;
                let path = keys.text("path")?.ok_or_else(|| field.wrong("it names no path"))?;
                let is_required = keys.take("required").is_none_or(|field| field.flag().unwrap_or(true));
                keys.finish()?;
                (path, is_required)
            }
            Kind::Scalar(_) | Kind::List(_) => (field.text()?, true),
        };
        let path = declared.path(&path);
        if !is_required && !path.exists() {
            continue;
        }
        for line in field.at(file_lines(&[path]))? {
            let (name, value) = line.split_once('=').map_or((line.as_str(), None), |(name, value)| (name, Some(value)));
            all.insert(name.to_owned(), value.map(str::to_owned));
        }
    }
    all.extend(keys.take("environment").map_or(Ok(BTreeMap::new()), |field| field.pairs())?);
    let line = |(name, value): (String, Option<String>)| match value.or_else(|| std::env::var(&name).ok()) {
        Some(value) => format!("{name}={value}"),
        None => name,
    };
    Ok(all.into_iter().map(line).collect())
}

/// A capability by its full name.
fn capability(name: &str) -> String {
    let name = name.to_uppercase();
    if name == "ALL" || name.starts_with("CAP_") { name } else { format!("CAP_{name}") }
}

fn hosts(field: &Field<'_>) -> anyhow::Result<Vec<String>> {
    if let Kind::Map(_) = &field.node.kind {
        let mut all = Vec::new();
        for (name, field) in field.entries()? {
            all.extend(field.texts()?.into_iter().map(|ip| format!("{ip} {name}")));
        }
        return Ok(all);
    }
    let host = |field: &Field<'_>| {
        let text = field.text()?;
        let parts = text.split_once('=').or_else(|| text.split_once(':'));
        let (name, ip) = parts.ok_or_else(|| field.wrong(format_args!("{text:?} cannot be read: write NAME:IP")))?;
        Ok(format!("{} {name}", ip.trim_matches(['[', ']'])))
    };
    field.items()?.iter().map(host).collect()
}

fn ulimits(field: &Field<'_>) -> anyhow::Result<Vec<Value>> {
    let limit = |(name, field): (&str, Field<'_>)| {
        if let Kind::Scalar(_) = &field.node.kind {
            let limit: i64 = field.number()?;
            return Ok(json!({"Name": name, "Soft": limit, "Hard": limit}));
        }
        let mut keys = field.keys()?;
        let mut side = |key: &str| keys.take(key).map_or(Ok(0), |field| field.number::<i64>());
        let limit = json!({"Name": name, "Soft": side("soft")?, "Hard": side("hard")?});
        keys.finish()?;
        Ok(limit)
    };
    field.entries()?.into_iter().map(limit).collect()
}

fn health(field: &Field<'_>) -> anyhow::Result<Value> {
    let mut keys = field.keys()?;
    let mut check = json!({});
    let test = keys.take("test");
    if keys.flag("disable")? {
        if let Some(test) = test {
            return Err(test.wrong("a check that is disabled has no test: take out one of both"));
        }
        check["Test"] = json!(["NONE"]);
    } else if let Some(test) = test {
        check["Test"] = match &test.node.kind {
            Kind::Scalar(_) => json!(["CMD-SHELL", test.text()?]),
            Kind::List(_) | Kind::Map(_) => json!(test.texts()?),
        };
    }
    for (key, member) in [
        ("interval", "Interval"),
        ("timeout", "Timeout"),
        ("start_period", "StartPeriod"),
        ("start_interval", "StartInterval"),
    ] {
        put(&mut check, member, time(&mut keys, key)?);
    }
    put(&mut check, "Retries", keys.take("retries").map(|field| field.number::<u64>()).transpose()?);
    keys.finish()?;
    Ok(check)
}

/// A secret or config that a service uses.
fn reference(field: &Field<'_>, kind: &str, known: &BTreeMap<String, String>) -> anyhow::Result<Value> {
    let mut file = json!({"UID": "0", "GID": "0", "Mode": 0o444});
    let source = if let Kind::Map(_) = &field.node.kind {
        let mut keys = field.keys()?;
        let source = keys.text("source")?.ok_or_else(|| field.wrong("it names no source"))?;
        file["Name"] = json!(keys.text("target")?.unwrap_or_else(|| source.clone()));
        put(&mut file, "UID", keys.text("uid")?);
        put(&mut file, "GID", keys.text("gid")?);
        put(&mut file, "Mode", keys.take("mode").map(|field| mode(&field)).transpose()?);
        keys.finish()?;
        source
    } else {
        let source = field.text()?;
        file["Name"] = json!(source);
        source
    };
    let name = known.get(&source).ok_or_else(|| {
        field.wrong(format_args!("{} {source:?} is declared nowhere in the file", kind.to_lowercase()))
    })?;
    Ok(json!({"File": file, format!("{kind}Name"): name}))
}

/// Permissions: a number as YAML reads it, or a text with octal digits.
pub(super) fn mode(field: &Field<'_>) -> anyhow::Result<u32> {
    match &field.node.kind {
        Kind::Scalar(Value::String(text)) => u32::from_str_radix(text.trim_start_matches("0o"), 8)
            .map_err(|_| field.wrong(format_args!("{text:?} is no mode: write octal digits, such as 0440"))),
        _ => field.number(),
    }
}

fn networks(declared: &Declared<'_>, service: &str, field: Option<&Field<'_>>) -> anyhow::Result<Value> {
    let named = match field.map(|field| (&field.node.kind, field)) {
        Some((Kind::Map(_), field)) => {
            field.entries()?.into_iter().map(|(key, field)| (key.to_owned(), field)).collect()
        }
        Some((Kind::List(_), field)) => {
            let names = field.items()?.into_iter().map(|field| Ok((field.text()?, field)));
            names.collect::<anyhow::Result<Vec<_>>>()?
        }
        Some((Kind::Scalar(_), _)) | None => Vec::new(),
    };
    let places = named.iter().map(|(key, field)| network(declared, service, key, field));
    let mut all = places.collect::<anyhow::Result<Vec<_>>>()?;
    if all.is_empty() {
        all.push(json!({"Target": declared.networks[DEFAULT_NETWORK], "Aliases": [service]}));
    }
    all.sort_by_key(|network| network["Target"].as_str().map(str::to_owned));
    Ok(json!(all))
}

/// A service's place in one network.
fn network(declared: &Declared<'_>, service: &str, key: &str, field: &Field<'_>) -> anyhow::Result<Value> {
    let name = match declared.networks.get(key) {
        Some(name) => name,
        None if PREDEFINED_NETWORKS.contains(&key) => key,
        None => return Err(field.wrong(format_args!("network {key:?} is declared nowhere in the file"))),
    };
    let mut place = json!({"Target": name});
    let mut aliases = Vec::new();
    if let Kind::Map(_) = &field.node.kind {
        let mut keys = field.keys()?;
        aliases = keys.take("aliases").map_or(Ok(Vec::new()), |field| field.texts())?;
        let options = keys.labels("driver_opts")?;
        put(&mut place, "DriverOpts", Some(options).filter(|options| !options.is_empty()));
        if let Some(fixed) = keys.take("ipv4_address").or_else(|| keys.take("ipv6_address")) {
            return Err(fixed.wrong("a service's tasks get their addresses from the swarm: take it out"));
        }
        keys.finish()?;
    }
    aliases.push(service.to_owned());
    place["Aliases"] = json!(aliases);
    Ok(place)
}

/// The ports of one entry: a range is several.
fn ports_of(field: &Field<'_>) -> anyhow::Result<Vec<Value>> {
    if let Kind::Map(_) = &field.node.kind {
        let mut keys = field.keys()?;
        let target = keys.take("target").ok_or_else(|| field.wrong("it names no target"))?.number::<u16>()?;
        let mut port =
            json!({"TargetPort": target, "Protocol": keys.text("protocol")?.unwrap_or_else(|| "tcp".into())});
        port["PublishMode"] = json!(keys.text("mode")?.unwrap_or_else(|| "ingress".into()));
        put(&mut port, "PublishedPort", keys.take("published").map(|field| field.number::<u16>()).transpose()?);
        put(&mut port, "HostIP", keys.text("host_ip")?);
        // For those who read the file.
        keys.ignore("name");
        keys.ignore("app_protocol");
        keys.finish()?;
        return Ok(vec![port]);
    }
    let text = field.text()?;
    let wrong = || field.wrong(format_args!("port {text:?} cannot be read: write 80, 8080:80 or 8080-8081:80-81/udp"));
    let (ports, protocol) = text.split_once('/').unwrap_or((&text, "tcp"));
    let mut parts = ports.rsplitn(3, ':');
    let target = parts.next().unwrap_or_default();
    let published = parts.next().filter(|published| !published.is_empty());
    let address = parts.next().map(|address| address.trim_matches(['[', ']']));
    let targets = range(target).ok_or_else(wrong)?;
    let published = published.map(|text| range(text).ok_or_else(wrong)).transpose()?;
    if published.as_ref().is_some_and(|published| published.len() != targets.len()) {
        return Err(field.wrong(format_args!("port {text:?}: both ranges must be of one length")));
    }
    let port = |(index, target): (usize, u16)| {
        let mut port = json!({"TargetPort": target, "Protocol": protocol, "PublishMode": "ingress"});
        put(
            &mut port,
            "PublishedPort",
            published.as_ref().map(|published| published.start() + u16::try_from(index).unwrap_or(0)),
        );
        put(&mut port, "HostIP", address);
        port
    };
    Ok(targets.enumerate().map(port).collect())
}

/// `80` or `80-82`.
fn range(text: &str) -> Option<std::ops::RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then_some(first..=last)
}

/// What `deploy` says.
fn deployment(spec: &mut Value, mut keys: Keys<'_>) -> anyhow::Result<()> {
    spec["Mode"] = scale(keys.take("mode").as_ref(), keys.take("replicas").as_ref())?;
    if let Some(mode) = keys.text("endpoint_mode")? {
        spec["EndpointSpec"]["Mode"] = json!(mode);
    }
    for (key, member) in [("update_config", "UpdateConfig"), ("rollback_config", "RollbackConfig")] {
        put(spec, member, keys.take(key).map(|field| renewal(&field)).transpose()?);
    }
    let task = &mut spec["TaskTemplate"];
    if let Some(field) = keys.take("restart_policy") {
        let mut keys = field.keys()?;
        let mut policy = json!({});
        put(&mut policy, "Condition", keys.text("condition")?);
        put(&mut policy, "Delay", time(&mut keys, "delay")?);
        put(&mut policy, "MaxAttempts", keys.take("max_attempts").map(|field| field.number::<u64>()).transpose()?);
        put(&mut policy, "Window", time(&mut keys, "window")?);
        keys.finish()?;
        task["RestartPolicy"] = policy;
    }
    if let Some(field) = keys.take("placement") {
        let mut keys = field.keys()?;
        put(&mut task["Placement"], "Constraints", keys.take("constraints").map(|field| field.texts()).transpose()?);
        let preferences = keys.take("preferences").map_or(Ok(Vec::new()), |list| list.items())?;
        let preferences: Vec<_> = preferences.iter().map(spread).collect::<anyhow::Result<_>>()?;
        put(&mut task["Placement"], "Preferences", Some(preferences).filter(|list| !list.is_empty()));
        let most = keys.take("max_replicas_per_node").map(|field| field.number::<u64>()).transpose()?;
        put(&mut task["Placement"], "MaxReplicas", most);
        keys.finish()?;
    }
    if let Some(field) = keys.take("resources") {
        let mut keys = field.keys()?;
        for (key, member) in [("limits", "Limits"), ("reservations", "Reservations")] {
            put(&mut task["Resources"], member, keys.take(key).map(|field| resources(&field)).transpose()?);
        }
        keys.finish()?;
    }
    keys.finish()
}

/// How many tasks there are.
fn scale(mode: Option<&Field<'_>>, replicas: Option<&Field<'_>>) -> anyhow::Result<Value> {
    let wrong = |reason: String| match mode.or(replicas) {
        Some(field) => field.wrong(reason),
        None => anyhow::anyhow!(reason),
    };
    let name = mode.map(Field::text).transpose()?.unwrap_or_else(|| "replicated".to_owned());
    let Some((_, member)) = MODES.into_iter().find(|(word, _)| *word == name) else {
        let known = MODES.map(|(word, _)| word).join(", ");
        return Err(wrong(format!("mode {name:?} is not known: use one of {known}")));
    };
    match (member, replicas.map(|field| field.number::<u64>()).transpose()?) {
        ("Replicated", Some(count)) => Ok(json!({"Replicated": {"Replicas": count}})),
        ("ReplicatedJob", count) => {
            let count = count.unwrap_or(1);
            Ok(json!({"ReplicatedJob": {"MaxConcurrent": count, "TotalCompletions": count}}))
        }
        (_, None) => Ok(json!({member: {}})),
        (_, Some(_)) => Err(wrong(format!("a {name} service has no replicas: take one of both out"))),
    }
}

fn spread(field: &Field<'_>) -> anyhow::Result<Value> {
    let mut keys = field.keys()?;
    let by = keys.text("spread")?.ok_or_else(|| field.wrong("write spread: node.labels.KEY"))?;
    keys.finish()?;
    Ok(json!({"Spread": {"SpreadDescriptor": by}}))
}

fn resources(field: &Field<'_>) -> anyhow::Result<Value> {
    let mut keys = field.keys()?;
    let mut resources = json!({});
    if let Some(cpus) = keys.take("cpus") {
        #[expect(clippy::cast_possible_truncation, reason = "CPUs are few")]
        let nanos = (cpus.number::<f64>()? * 1e9).round() as i64;
        resources["NanoCPUs"] = json!(nanos);
    }
    put(&mut resources, "MemoryBytes", keys.take("memory").map(|field| field.at(size(&field.text()?))).transpose()?);
    if let Some(list) = keys.take("generic_resources") {
        let generic: Vec<_> = list.items()?.iter().map(generic_resource).collect::<anyhow::Result<_>>()?;
        resources["GenericResources"] = json!(generic);
    }
    put(&mut resources, "Pids", keys.take("pids").map(|field| field.number::<i64>()).transpose()?);
    keys.finish()?;
    Ok(resources)
}

/// So many of a kind.
fn generic_resource(field: &Field<'_>) -> anyhow::Result<Value> {
    let mut keys = field.keys()?;
    let missing = || field.wrong("write discrete_resource_spec: {kind: KIND, value: NUMBER}");
    let spec = keys.take("discrete_resource_spec").ok_or_else(missing)?;
    keys.finish()?;
    let mut keys = spec.keys()?;
    let kind = keys.text("kind")?.ok_or_else(missing)?;
    let value = keys.take("value").ok_or_else(missing)?.number::<i64>()?;
    keys.finish()?;
    Ok(json!({"DiscreteResourceSpec": {"Kind": kind, "Value": value}}))
}

fn renewal(field: &Field<'_>) -> anyhow::Result<Value> {
    let mut keys = field.keys()?;
    let mut config = json!({"Parallelism": 1});
    put(&mut config, "Parallelism", keys.take("parallelism").map(|field| field.number::<u64>()).transpose()?);
    put(&mut config, "Delay", time(&mut keys, "delay")?);
    put(&mut config, "FailureAction", keys.text("failure_action")?);
    put(&mut config, "Monitor", time(&mut keys, "monitor")?);
    put(&mut config, "MaxFailureRatio", keys.take("max_failure_ratio").map(|field| field.number::<f64>()).transpose()?);
    put(&mut config, "Order", keys.text("order")?);
    keys.finish()?;
    Ok(config)
}

/// What `restart` says, as tasks are restarted.
fn restart_policy(field: &Field<'_>) -> anyhow::Result<Value> {
    let text = field.text()?;
    let (policy, most) = text.split_once(':').map_or((text.as_str(), None), |(policy, most)| (policy, Some(most)));
    let mut restart = match policy {
        "no" | "false" | "none" => json!({"Condition": "none"}),
        "always" | "unless-stopped" => json!({"Condition": "any"}),
        "on-failure" => json!({"Condition": "on-failure"}),
        _ => {
            return Err(
                field.wrong(format_args!("{text:?} is no policy: use no, always, on-failure or unless-stopped"))
            );
        }
    };
    if let Some(most) = most {
        let most: u64 = most.parse().map_err(|_| field.wrong(format_args!("{most:?} is no number of attempts")))?;
        restart["MaxAttempts"] = json!(most);
    }
    Ok(restart)
}
