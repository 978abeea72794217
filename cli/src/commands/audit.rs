//! `skep audit`: how a host stands by the CIS Docker Benchmark 1.6, check by check. What a program
//! cannot judge, such as who may be trusted, is not here.

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use serde_json::{Value, json};

use crate::client::Client;
use crate::output::{aligned, line};

#[derive(clap::Args)]
pub(crate) struct AuditArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Exit with 1 if a check has not passed
    #[arg(long)]
    strict: bool,
}

/// What a check came to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Pass,
    /// What stands against it, and what to do.
    Warn(String),
    /// Why it was not looked at.
    Skip(&'static str),
}

/// One check, by the benchmark's number.
struct Finding {
    id: &'static str,
    title: &'static str,
    verdict: Verdict,
}

/// What is known of a host.
#[derive(Default)]
struct Facts {
    info: Value,
    containers: Vec<Value>,
    images: Vec<Value>,
    networks: Vec<Value>,
    /// Of the swarm, if this host is one of its managers.
    swarm: Option<Swarm>,
    /// Files of this host; none where the daemon is on another.
    files: Option<Files>,
}

struct Swarm {
    cluster: Value,
    nodes: Vec<Value>,
    services: Vec<Value>,
    overlays: Vec<Value>,
}

/// Owner, group and mode.
type Access = (u32, u32, u32);

struct Files {
    socket: Option<Access>,
    config: Option<Access>,
    /// Whether the data root has a file system of its own.
    own_partition: bool,
}

/// Runs all checks; says whether all have passed.
pub(crate) async fn run(client: &Client, args: &AuditArgs) -> anyhow::Result<bool> {
    let findings = judge(&Facts::gather(client).await?);
    let passed = findings.iter().all(|finding| !matches!(finding.verdict, Verdict::Warn(_)));
    if args.json {
        let rows = findings.iter().map(|finding| {
            let (result, detail) = finding.verdict.words();
            json!({"ID": finding.id, "Title": finding.title, "Result": result, "Detail": detail})
        });
        line(&serde_json::to_string_pretty(&rows.collect::<Vec<_>>())?)?;
    } else {
        let rows: Vec<Vec<String>> = findings
            .iter()
            .map(|finding| {
                let (result, detail) = finding.verdict.words();
                [result, finding.id, finding.title, detail].map(str::to_owned).to_vec()
            })
            .collect();
        aligned(&rows)?;
        let count = |wanted: &str| findings.iter().filter(|finding| finding.verdict.words().0 == wanted).count();
        line(&format!("\n{} passed, {} warnings, {} not looked at", count("PASS"), count("WARN"), count("SKIP")))?;
    }
    Ok(passed || !args.strict)
}

impl Verdict {
    fn words(&self) -> (&str, &str) {
        match self {
            Self::Pass => ("PASS", ""),
            Self::Warn(detail) => ("WARN", detail),
            Self::Skip(reason) => ("SKIP", reason),
        }
    }

    /// Passes if nothing stands against it.
    fn against(offenders: &[String], advice: &str) -> Self {
        if offenders.is_empty() { Self::Pass } else { Self::Warn(format!("{}: {advice}", offenders.join(", "))) }
    }

    fn when(good: bool, advice: &str) -> Self {
        if good { Self::Pass } else { Self::Warn(advice.to_owned()) }
    }
}

impl Facts {
    async fn gather(client: &Client) -> anyhow::Result<Self> {
        let list = |value: Value| value.as_array().cloned().unwrap_or_default();
        let info = client.get("/info").await?;
        let (mut containers, mut images, mut networks) = (Vec::new(), Vec::new(), Vec::new());
        for container in list(client.get("/containers/json").await?) {
            containers.push(client.get(&format!("/containers/{}/json", text(&container, "/Id"))).await?);
        }
        for image in list(client.get("/images/json").await?) {
            images.push(client.get(&format!("/images/{}/json", text(&image, "/Id"))).await?);
        }
        for network in list(client.get("/networks").await?) {
            networks.push(client.get(&format!("/networks/{}", text(&network, "/Id"))).await?);
        }
        let swarm = if info["Swarm"]["ControlAvailable"] == true {
            Some(Swarm {
                cluster: client.get("/swarm").await?,
                nodes: list(client.get("/nodes").await?),
                services: list(client.get("/services").await?),
                overlays: networks.iter().filter(|network| network["Driver"] == "overlay").cloned().collect(),
            })
        } else {
            None
        };
        let files = client.socket().map(|socket| Files {
            socket: access(socket),
            config: access(Path::new("/etc/skep/daemon.json")),
            own_partition: device(Path::new(text(&info, "/DockerRootDir"))) != device(Path::new("/")),
        });
        Ok(Self { info, containers, images, networks, swarm, files })
    }
}

fn access(path: &Path) -> Option<Access> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.uid(), meta.gid(), meta.permissions().mode() & 0o7777))
}

fn device(path: &Path) -> Option<u64> {
    Some(std::fs::metadata(path).ok()?.dev())
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn has(value: &Value, pointer: &str, wanted: impl Fn(&Value) -> bool) -> bool {
    value.pointer(pointer).and_then(Value::as_array).is_some_and(|list| list.iter().any(wanted))
}

fn is_filled(value: &Value, pointer: &str) -> bool {
    match value.pointer(pointer) {
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(members)) => !members.is_empty(),
        Some(Value::Number(number)) => number.as_i64() != Some(0),
        Some(Value::String(text)) => !text.is_empty(),
        Some(Value::Bool(on)) => *on,
        Some(Value::Null) | None => false,
    }
}

fn judge(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    host(facts, &mut findings);
    daemon(facts, &mut findings);
    files(facts, &mut findings);
    images(facts, &mut findings);
    for check in &CONTAINER_CHECKS {
        let bad = facts.containers.iter().filter(|container| (check.is_bad)(container));
        let names: Vec<_> = bad.map(|container| text(container, "/Name").trim_start_matches('/').to_owned()).collect();
        findings.push(Finding { id: check.id, title: check.title, verdict: Verdict::against(&names, check.advice) });
    }
    swarm(facts, &mut findings);
    findings
}

/// Why files are not looked at.
const ELSEWHERE: Verdict = Verdict::Skip("the daemon is on another host");

fn host(facts: &Facts, findings: &mut Vec<Finding>) {
    let advice = "mount one at the data root: containers that fill it leave the host alone";
    let own = facts.files.as_ref().map_or(ELSEWHERE, |files| Verdict::when(files.own_partition, advice));
    findings.push(Finding { id: "1.1.1", title: "containers have a partition of their own", verdict: own });
}

fn daemon(facts: &Facts, findings: &mut Vec<Finding>) {
    let info = &facts.info;
    let option =
        |name: &str| has(info, "/SecurityOptions", |found| found.as_str().is_some_and(|o| o.starts_with(name)));
    let bridge = facts.networks.iter().find(|network| network["Name"] == "bridge");
    let apart = bridge.is_some_and(|bridge| bridge["Options"]["com.docker.network.bridge.enable_icc"] == "false");
    let registries = info.pointer("/RegistryConfig/IndexConfigs").and_then(Value::as_object);
    let insecure: Vec<String> = registries
        .into_iter()
        .flatten()
        .filter(|(_, config)| config["Secure"] == false)
        .map(|(name, _)| name.clone())
        .collect();
    let plain = has(info, "/Warnings", |told| told.as_str().is_some_and(|told| told.contains("without encryption")));
    let logs = text(info, "/LoggingDriver");
    let mut add = |id, title, verdict| findings.push(Finding { id, title, verdict });
    add("2.1", "the daemon runs without root", Verdict::Warn("rootless mode is not supported yet".into()));
    add(
        "2.2",
        "containers on the default bridge are kept apart",
        Verdict::when(apart, "start the daemon with --icc=false"),
    );
    add("2.4", "the daemon makes the rules that published ports need", Verdict::Pass);
    add("2.5", "no registry is spoken to without TLS", Verdict::against(&insecure, "give it a certificate"));
    add("2.6", "the storage driver is not aufs", Verdict::when(text(info, "/Driver") != "aufs", "use overlay2"));
    add("2.7", "the API on TCP asks for certificates", Verdict::when(!plain, "start the daemon with --tlsverify"));
    add(
        "2.9",
        "containers have user namespaces",
        Verdict::when(option("name=userns"), "start the daemon with --userns-remap=default"),
    );
    add(
        "2.12",
        "who may do what is asked of a plugin",
        Verdict::Warn("authorization plugins are not supported".into()),
    );
    let central = matches!(logs, "syslog" | "journald");
    add(
        "2.13",
        "logs go to one place",
        Verdict::when(central, "start the daemon with --log-driver syslog or journald"),
    );
    let none = option("name=no-new-privileges");
    add("2.14", "containers gain no privileges", Verdict::when(none, "start the daemon with --no-new-privileges"));
    add(
        "2.15",
        "containers outlive the daemon",
        Verdict::when(info["LiveRestoreEnabled"] == true, "use a newer daemon"),
    );
    add("2.16", "no proxy in user space carries published ports", Verdict::Pass);
    let experimental = info["ExperimentalBuild"] == true;
    add("2.18", "nothing experimental is on", Verdict::when(!experimental, "use a release"));
}

fn files(facts: &Facts, findings: &mut Vec<Finding>) {
    let mut check = |id, title, access: Option<Option<Access>>, good: &dyn Fn(Access) -> bool, advice: &str| {
        let verdict = match access {
            None => ELSEWHERE,
            // What is not there is not open to anybody.
            Some(None) => Verdict::Pass,
            Some(Some(access)) => Verdict::when(good(access), advice),
        };
        findings.push(Finding { id, title, verdict });
    };
    let files = facts.files.as_ref();
    let socket = files.map(|files| files.socket);
    check("3.15", "the socket is root's", socket, &|(uid, ..)| uid == 0, "chown it to root");
    check("3.16", "others may not use the socket", socket, &|(.., mode)| mode & 0o007 == 0, "chmod it to 660");
    let config = files.map(|files| files.config);
    check("3.17", "daemon.json is root's", config, &|(uid, gid, _)| (uid, gid) == (0, 0), "chown it to root:root");
    check("3.18", "only root writes daemon.json", config, &|(.., mode)| mode & 0o022 == 0, "chmod it to 644");
}

fn images(facts: &Facts, findings: &mut Vec<Finding>) {
    let used: BTreeSet<&str> = facts.containers.iter().map(|container| text(container, "/Image")).collect();
    let name = |image: &Value| {
        image["RepoTags"]
            .as_array()
            .and_then(|tags| tags.first()?.as_str())
            .unwrap_or_else(|| text(image, "/Id"))
            .to_owned()
    };
    let bad = |is_bad: &dyn Fn(&Value) -> bool| -> Vec<String> {
        facts.images.iter().filter(|image| used.contains(text(image, "/Id")) && is_bad(image)).map(name).collect()
    };
    let root = facts
        .containers
        .iter()
        .filter(|container| matches!(text(container, "/Config/User").split(':').next(), Some("" | "0" | "root")));
    let root: Vec<_> = root.map(|container| text(container, "/Name").trim_start_matches('/').to_owned()).collect();
    let unchecked = bad(&|image| !is_filled(image, "/Config/Healthcheck"));
    for (id, title, verdict) in [
        (
            "4.1",
            "containers run as somebody else than root",
            Verdict::against(&root, "name a USER in the image, or --user"),
        ),
        ("4.6", "images say how their health is checked", Verdict::against(&unchecked, "add a HEALTHCHECK")),
    ] {
        findings.push(Finding { id, title, verdict });
    }
}

/// What is to be true of every container that runs.
struct ContainerCheck {
    id: &'static str,
    title: &'static str,
    is_bad: fn(&Value) -> bool,
    advice: &'static str,
}

const fn container(
    id: &'static str,
    title: &'static str,
    is_bad: fn(&Value) -> bool,
    advice: &'static str,
) -> ContainerCheck {
    ContainerCheck { id, title, is_bad, advice }
}

const SENSITIVE: [&str; 9] = ["/", "/boot", "/dev", "/etc", "/lib", "/proc", "/run", "/sys", "/usr"];
const PRIVILEGED_PORTS_END: u16 = 1024;

const CONTAINER_CHECKS: [ContainerCheck; 22] = [
    container(
        "5.2",
        "AppArmor confines them, where the host has it",
        |c| text(c, "/AppArmorProfile") == "unconfined",
        "leave apparmor=unconfined out",
    ),
    container("5.3", "capabilities are not added", |c| is_filled(c, "/HostConfig/CapAdd"), "leave --cap-add out"),
    container(
        "5.4",
        "containers are not privileged",
        |c| is_filled(c, "/HostConfig/Privileged"),
        "leave --privileged out",
    ),
    container(
        "5.5",
        "the host's own directories are not mounted",
        |c| has(c, "/Mounts", |mount| mount["RW"] == true && SENSITIVE.contains(&text(mount, "/Source"))),
        "mount what is needed alone, read-only",
    ),
    container(
        "5.7",
        "privileged ports are not published",
        |c| published(c, |port, _| port < PRIVILEGED_PORTS_END),
        "publish at 1024 or above",
    ),
    container(
        "5.9",
        "the host's network is not shared",
        |c| text(c, "/HostConfig/NetworkMode") == "host",
        "leave --network host out",
    ),
    container("5.10", "memory is limited", |c| !is_filled(c, "/HostConfig/Memory"), "give --memory"),
    container(
        "5.11",
        "CPU is limited",
        |c| !["CpuShares", "NanoCpus", "CpuQuota"].iter().any(|key| is_filled(c, &format!("/HostConfig/{key}"))),
        "give --cpus or --cpu-shares",
    ),
    container(
        "5.12",
        "the root file system is read-only",
        |c| !is_filled(c, "/HostConfig/ReadonlyRootfs"),
        "give --read-only",
    ),
    container(
        "5.13",
        "ports are bound to one address",
        |c| published(c, |_, ip| matches!(ip, "" | "0.0.0.0" | "::")),
        "publish as ADDRESS:PORT:PORT",
    ),
    container(
        "5.14",
        "restarts are limited to five",
        |c| matches!(text(c, "/HostConfig/RestartPolicy/Name"), "always" | "unless-stopped"),
        "use --restart on-failure:5",
    ),
    container(
        "5.15",
        "the host's processes are not shared",
        |c| text(c, "/HostConfig/PidMode") == "host",
        "leave --pid host out",
    ),
    container(
        "5.16",
        "the host's IPC is not shared",
        |c| text(c, "/HostConfig/IpcMode") == "host",
        "leave --ipc host out",
    ),
    container(
        "5.17",
        "devices of the host are not given",
        |c| is_filled(c, "/HostConfig/Devices"),
        "leave --device out",
    ),
    container(
        "5.19",
        "mounts do not spread to the host",
        |c| has(c, "/Mounts", |mount| text(mount, "/Propagation").ends_with("shared")),
        "leave shared propagation out",
    ),
    container(
        "5.20",
        "the host's UTS namespace is not shared",
        |c| text(c, "/HostConfig/UTSMode") == "host",
        "leave --uts host out",
    ),
    container(
        "5.21",
        "system calls are filtered",
        |c| security(c, |option| option == "seccomp=unconfined"),
        "leave seccomp=unconfined out",
    ),
    container(
        "5.25",
        "programs gain no privileges",
        |c| security(c, |option| matches!(option, "no-new-privileges=false" | "no-new-privileges:false")),
        "leave no-new-privileges=false out",
    ),
    container(
        "5.26",
        "health is checked",
        |c| !is_filled(c, "/Config/Healthcheck"),
        "give --health-cmd, or a HEALTHCHECK in the image",
    ),
    container(
        "5.28",
        "the number of processes is limited",
        |c| !is_filled(c, "/HostConfig/PidsLimit"),
        "give --pids-limit",
    ),
    container(
        "5.29",
        "the default bridge is not used",
        |c| matches!(text(c, "/HostConfig/NetworkMode"), "" | "default" | "bridge"),
        "make a network, and use it",
    ),
    container(
        "5.31",
        "the daemon's socket is not mounted",
        |c| has(c, "/Mounts", |mount| ["skep.sock", "docker.sock"].iter().any(|s| text(mount, "/Source").ends_with(s))),
        "leave it out",
    ),
];

fn security(container: &Value, wanted: impl Fn(&str) -> bool) -> bool {
    has(container, "/HostConfig/SecurityOpt", |option| option.as_str().is_some_and(&wanted))
}

/// Whether some port is published so, by number and address.
fn published(container: &Value, wanted: impl Fn(u16, &str) -> bool) -> bool {
    let ports = container.pointer("/NetworkSettings/Ports").and_then(Value::as_object).into_iter().flatten();
    let bindings = ports.flat_map(|(_, bindings)| bindings.as_array().into_iter().flatten());
    bindings
        .into_iter()
        .any(|binding| text(binding, "/HostPort").parse().is_ok_and(|port| wanted(port, text(binding, "/HostIp"))))
}

fn swarm(facts: &Facts, findings: &mut Vec<Finding>) {
    const TITLES: [(&str, &str); 9] = [
        ("7.1", "there are few managers, and an odd number"),
        ("7.2", "the swarm listens on one address"),
        ("7.3", "overlay networks are encrypted"),
        ("7.4", "secrets are handed out by the swarm"),
        ("7.5", "managers are locked when they start"),
        ("7.6", "the unlock key is changed"),
        ("7.7", "certificates of nodes are renewed"),
        ("7.8", "the CA is renewed"),
        ("7.9", "packets of services go elsewhere than the managers'"),
    ];
    let Some(swarm) = &facts.swarm else {
        let reason = "this host is no manager of a swarm";
        findings.extend(TITLES.map(|(id, title)| Finding { id, title, verdict: Verdict::Skip(reason) }));
        return;
    };
    let managers = swarm.nodes.iter().filter(|node| node["Spec"]["Role"] == "manager").count();
    let plain = |network: &&Value| network["Options"].get("encrypted").is_some_and(|value| value == "false");
    let plain: Vec<_> = swarm.overlays.iter().filter(plain).map(|network| text(network, "/Name").to_owned()).collect();
    let in_env = |service: &&Value| {
        let env = service.pointer("/Spec/TaskTemplate/ContainerSpec/Env").and_then(Value::as_array);
        let names = env.into_iter().flatten().filter_map(|var| var.as_str()?.split('=').next());
        names.into_iter().any(|name| {
            let name = name.to_ascii_uppercase();
            ["PASSWORD", "SECRET", "TOKEN"].iter().any(|word| name.contains(word)) && !name.ends_with("_FILE")
        })
    };
    let in_env: Vec<_> =
        swarm.services.iter().filter(in_env).map(|service| text(service, "/Spec/Name").to_owned()).collect();
    let lock = is_filled(&swarm.cluster, "/Spec/EncryptionConfig/AutoLockManagers");
    let expiry = swarm.cluster.pointer("/Spec/CAConfig/NodeCertExpiry").and_then(Value::as_i64).unwrap_or(0);
    const NINETY_DAYS: i64 = 90 * 24 * 3600 * 1_000_000_000;
    let listens_everywhere = "whether it does is not told by the API: see --listen-addr of 'skep swarm init'";
    let verdicts = [
        Verdict::when(
            (1..=7).contains(&managers) && managers % 2 == 1,
            "have 3, 5 or 7: 'skep node promote', 'demote'",
        ),
        Verdict::Skip(listens_everywhere),
        Verdict::against(&plain, "make it anew without encrypted=false"),
        Verdict::against(&in_env, "give what is secret as a secret, not as a variable"),
        Verdict::when(lock, "'skep swarm update --autolock'"),
        Verdict::Skip("when it was changed is told by nobody: 'skep swarm unlock-key --rotate' does it"),
        Verdict::when((1..=NINETY_DAYS).contains(&expiry), "'skep swarm update --cert-expiry 2160h'"),
        Verdict::Skip("another CA is not supported yet"),
        Verdict::Skip("it is told by --data-path-addr of 'skep swarm init' and 'join'"),
    ];
    findings.extend(TITLES.into_iter().zip(verdicts).map(|((id, title), verdict)| Finding { id, title, verdict }));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(facts: &Facts, id: &str) -> Verdict {
        judge(facts).into_iter().find(|finding| finding.id == id).unwrap().verdict
    }

    #[test]
    fn what_stands_against_a_check_is_named() {
        let bad = json!({
            "Name": "/web", "Config": {"User": "root"},
            "HostConfig": {"Privileged": true, "NetworkMode": "host", "CapAdd": ["SYS_ADMIN"]},
            "Mounts": [{"Source": "/etc", "RW": true}, {"Source": "/run/skep/skep.sock", "RW": false}],
            "NetworkSettings": {"Ports": {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "80"}]}},
        });
        let facts = Facts { containers: vec![bad], ..Facts::default() };
        for id in ["4.1", "5.3", "5.4", "5.5", "5.7", "5.9", "5.10", "5.12", "5.13", "5.31"] {
            let Verdict::Warn(detail) = verdict(&facts, id) else { panic!("{id} passes") };
            assert!(detail.starts_with("web: "), "{id}: {detail}");
        }
        for id in ["5.14", "5.15", "5.20", "5.21", "5.25"] {
            assert_eq!(verdict(&facts, id), Verdict::Pass, "{id}");
        }
        assert!(matches!(verdict(&facts, "7.1"), Verdict::Skip(_)));
        assert!(matches!(verdict(&facts, "3.16"), Verdict::Skip(_)));
    }

    #[test]
    fn every_check_has_a_number_of_its_own() {
        let findings = judge(&Facts::default());
        let ids: BTreeSet<_> = findings.iter().map(|finding| finding.id).collect();
        assert_eq!(ids.len(), findings.len());
    }
}
