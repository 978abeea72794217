//! Our own client on a host: what its verbs do, and what its mistakes are told as.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use skep_chaos_tests::{Host, LIMIT, Ran, Rig, has_docker, program, take_turn, wait_until};

/// A daemon with an image of busybox, called `box`.
fn one_host() -> Rig {
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.import("box", &["CMD [\"sh\"]"], |_| ());
    rig
}

fn write(host: &Host, name: &str, text: &str) -> String {
    let path = host.dir().join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[test]
fn files_go_both_ways_and_containers_become_images() {
    take_turn!();
    let rig = one_host();
    let host = rig.host(1);
    host.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "--memory",
        "64m",
        "--mount",
        "src=data,dst=/data",
        "box",
        "sleep",
        "1000",
    ]);

    // A file under its own name, under another one, into a directory; a directory with all in it.
    let note = write(host, "note", "hello");
    host.ok(&["cp", &note, "web:/tmp/other"]);
    host.ok(&["cp", &note, "web:/data"]);
    assert_eq!(host.ok(&["exec", "web", "cat", "/tmp/other", "/data/note"]), "hellohello");
    let back = host.dir().join("back").display().to_string();
    host.ok(&["cp", "web:/tmp", &back]);
    assert_eq!(std::fs::read_to_string(Path::new(&back).join("other")).unwrap(), "hello");
    host.ok(&["cp", &format!("{back}/."), "web:/data"]);
    assert_eq!(host.ok(&["exec", "web", "cat", "/data/other"]), "hello");
    for (args, want) in [
        (["cp", "web:/nothing", &back], "Could not find the file /nothing"),
        (["cp", &note, "web:/nowhere/"], "directory /nowhere/ is not in container web"),
        (["cp", &note, &back], "write CONTAINER:PATH"),
        (["cp", "nobody:/tmp", &back], "No such container: nobody"),
    ] {
        let told = host.fails(&args);
        assert!(told.contains(want), "{args:?}: {told}");
    }
    assert!(host.ok(&["diff", "web"]).contains("A /tmp/other"));

    host.ok(&["commit", "-c", "CMD [\"cat\", \"/tmp/other\"]", "web", "made:1"]);
    assert_eq!(host.ok(&["run", "--rm", "made:1"]), "hello");
    // As docker has it: the host's name, not help.
    assert_eq!(host.ok(&["run", "--rm", "-h", "named", "box", "cat", "/etc/hostname"]).trim(), "named");
    let table = host.ok(&["ps", "--format", "table {{.Names}}\\t{{.Image}}"]);
    assert_eq!(
        table.lines().map(|line| line.split_whitespace().collect()).collect::<Vec<Vec<_>>>(),
        [["NAMES", "IMAGE"], ["web", "box"]]
    );
    assert_eq!(host.ok(&["inspect", "-f", "{{.Name}}", "web"]).trim(), "/web");
    let archive = host.dir().join("made.tar").display().to_string();
    host.ok(&["save", "-o", &archive, "made:1"]);
    host.ok(&["rmi", "made:1"]);
    host.ok(&["load", "-q", "-i", &archive]);
    assert!(host.ok(&["image", "ls", "--format", "{{.Repository}}:{{.Tag}}"]).contains("made:1"));

    host.ok(&["update", "--memory", "128m", "--restart", "always", "web"]);
    let limits = "{{.HostConfig.Memory}} {{.HostConfig.RestartPolicy.Name}}";
    assert_eq!(host.ok(&["inspect", "--format", limits, "web"]).trim(), "134217728 always");
    assert!(host.fails(&["update", "web"]).contains("nothing to change is named"));
    assert_eq!(host.ok(&["inspect", "--format", "{{.Driver}}", "data"]).trim(), "local");
    assert!(host.fails(&["inspect", "ghost"]).contains("nothing is called ghost"));
    let row = host.ok(&["stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}"]);
    assert!(row.starts_with("web ") && row.trim().ends_with("/ 128.0MiB"), "{row}");

    let events = host.ok(&["events", "--since", "1h", "--until", "0s", "--format", "{{.Type}} {{.Action}}"]);
    for want in ["container create", "container start", "container commit", "container update", "image load"] {
        assert!(events.contains(want), "{want} is not among {events}");
    }
    // Nobody is there to say yes.
    assert!(host.fails(&["system", "prune"]).contains("--force"));
    host.ok(&["rm", "-f", "web"]);
    let pruned = host.ok(&["system", "prune", "-f", "-a"]);
    assert!(pruned.contains("Untagged: made:1") && pruned.contains("reclaimed space"), "{pruned}");
    assert!(host.ok(&["volume", "ls", "-q"]).contains("data"), "volumes are left out unless asked for");
}

#[test]
fn services_take_and_lose_what_flags_say() {
    take_turn!();
    let rig = one_host();
    let host = rig.host(1);
    host.ok(&["swarm", "init", "--advertise-addr", host.addr()]);
    let vars = write(host, "vars", "# colours\nRED=1\nGREEN=2\n");
    let create = ["service", "create", "-d", "--name", "web", "--no-resolve-image", "--env-file", &vars];
    let more = [
        "--dns=10.0.0.9",
        "--dns-search=ex.am",
        "--dns-option=ndots:2",
        "--host=db:10.1.2.3",
        "--mount=type=tmpfs,dst=/scratch",
        "--group=5",
        "--container-label=team=a",
        "--sysctl=net.ipv4.ip_unprivileged_port_start=80",
        "--ulimit=nofile=100:200",
        "--placement-pref=spread=node.labels.zone",
        "--entrypoint=sh -c 'sleep 1000'",
        "--tty",
        "--read-only",
    ];
    host.ok(&[&create[..], &more, &["box"]].concat());
    host.await_replicas("web", "1/1");
    let (name, pid) = host.running().into_iter().next().unwrap();
    assert!(name.starts_with("web.1."), "{name}");
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(String::from_utf8_lossy(&environment).contains("GREEN=2"));
    let pretty = host.ok(&["service", "inspect", "--pretty", "web"]);
    for want in ["Name: web", "Search: ex.am", "Hosts: 10.1.2.3 db", "Target: /scratch", "Command: sh -c sleep 1000"] {
        assert!(pretty.contains(want), "{want} is not in {pretty}");
    }

    let gone = [
        "--env-rm=RED",
        "--env-rm=GREEN",
        "--dns-rm=10.0.0.9",
        "--dns-search-rm=ex.am",
        "--dns-option-rm=ndots:2",
        "--host-rm=db",
        "--mount-rm=/scratch",
        "--group-rm=5",
        "--container-label-rm=team",
        "--sysctl-rm=net.ipv4.ip_unprivileged_port_start",
        "--ulimit-rm=nofile",
        "--placement-pref-rm=spread=node.labels.zone",
        "--tty=false",
        "--read-only=false",
        "--update-monitor=1ms",
    ];
    host.ok(&[&["service", "update", "-q"], &gone[..], &["web"]].concat());
    let spec = host.ok(&["service", "inspect", "--format", "{{json .Spec.TaskTemplate}}", "web"]);
    let spec: serde_json::Value = serde_json::from_str(&spec).unwrap();
    for member in ["Env", "Hosts", "Mounts", "Groups", "Labels", "Sysctls", "Ulimits", "TTY", "ReadOnly"] {
        let left = &spec["ContainerSpec"][member];
        let nothing = left.is_null() || *left == false || left.as_array().is_some_and(Vec::is_empty);
        assert!(nothing || left.as_object().is_some_and(serde_json::Map::is_empty), "{member} is still {left}");
    }
    assert!(spec["Placement"]["Preferences"].as_array().is_none_or(Vec::is_empty), "{spec}");

    // One without a name is given one; what is not there yet is refused, not ignored.
    let id = host.ok(&["service", "create", "-d", "--no-resolve-image", "--replicas", "0", "box"]);
    assert!(host.ok(&["service", "ls", "--format", "{{.Name}}"]).contains(&id[..12]));
    for (args, want) in [
        (&["swarm", "update", "--external-ca", "protocol=cfssl,url=https://ca"][..], "an external CA is not supported"),
        (&["swarm", "unlock-key"], "not locked"),
    ] {
        let told = host.fails(args);
        assert!(told.contains(want), "{args:?}: {told}");
    }
}

#[test]
fn credentials_of_the_docker_client_and_of_helpers_are_used() {
    take_turn!();
    let rig = one_host();
    let host = rig.host(1);
    // A helper that keeps what it is given in a file, as the protocol says.
    let helper = write(
        host,
        "docker-credential-drawer",
        "#!/bin/sh\ncase $1 in\nstore) cat > \"$DRAWER\";;\nget) cat > /dev/null; cat \"$DRAWER\" 2>/dev/null || \
         { echo credentials not found in native keychain; exit 1; };;\nerase) cat > /dev/null; rm -f \"$DRAWER\";;\nesac\n",
    );
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    write(host, "config.json", r#"{"credsStore": "drawer"}"#);
    let drawer = host.dir().join("drawer");
    let client = |args: &str| {
        let script = format!(
            "export PATH={0}:$PATH DOCKER_CONFIG={0} DRAWER={1}; {2} -H {3} {args}",
            host.dir().display(),
            drawer.display(),
            program().display(),
            host.socket()
        );
        host.exec("sh", &["-c", &script])
    };
    // Nobody answers there: a login that failed keeps nothing.
    let refused = client("login -u ann -p secret 127.0.0.1:1");
    assert!(!refused.success && refused.stderr.contains("127.0.0.1:1"), "{refused:?}");
    assert!(!drawer.exists());
    std::fs::write(&drawer, r#"{"ServerURL": "127.0.0.1:1", "Username": "ann", "Secret": "secret"}"#).unwrap();
    let out = client("logout 127.0.0.1:1");
    assert!(out.stdout.contains("Removed the credentials"), "{out:?}");
    assert!(!drawer.exists());
    assert!(client("logout 127.0.0.1:1").stdout.contains("Not logged in"));
    std::fs::remove_file(&helper).unwrap();
    let broken = client("pull 127.0.0.1:1/a");
    assert!(broken.stderr.contains("docker-credential-drawer does not run"), "{broken:?}");
    wait_until("the daemon is well", LIMIT, || (host.run(&["version"]).success, host.log()));
}

/// Files of a CA, of a daemon at `addr`, and of a client: ca.pem, server-*.pem, cert.pem, key.pem.
fn make_certificates(dir: &Path, addr: &str) {
    std::fs::create_dir(dir).unwrap();
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
    let key = || rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_key = key();
    write("ca.pem", params.self_signed(&ca_key).unwrap().pem());
    let issuer = rcgen::Issuer::new(params, ca_key);
    for (names, cert_file, key_file) in
        [(vec![addr.to_owned()], "server-cert.pem", "server-key.pem"), (Vec::new(), "cert.pem", "key.pem")]
    {
        let own = key();
        let params = rcgen::CertificateParams::new(names).unwrap();
        write(cert_file, params.signed_by(&own, &issuer).unwrap().pem());
        write(key_file, own.serialize_pem());
    }
}

/// A context is taken elsewhere, whoever packed it.
fn packed_contexts_are_taken_in(skep: &impl Fn(&[&str]) -> Ran, (host, config_dir): (&Host, &str), address: &str) {
    let file = |name: &str| host.dir().join(name).display().to_string();
    let (packed, again) = (file("hive.packed"), file("again.packed"));
    assert!(skep(&["context", "export", "hive", &packed]).success);
    assert!(skep(&["context", "export", "hive", &packed]).stderr.contains("exists"));
    assert!(skep(&["context", "import", "hive-2", &packed]).success);
    let told = skep(&["context", "inspect", "hive-2"]).stdout;
    assert!(told.contains(address) && told.contains("bees"), "{told}");
    assert!(skep(&["context", "import", "hive-2", &packed]).stderr.contains("already exists"));
    assert!(skep(&["context", "rm", "hive-2"]).success);
    if has_docker() {
        let docker = |args: &[&str]| host.exec("env", &[&[config_dir, "docker", "context"], args].concat());
        for done in [docker(&["import", "hive-3", &packed]), docker(&["export", "hive-3", &again])] {
            assert!(done.success, "{done:?}");
        }
        assert!(skep(&["context", "import", "hive-4", &again]).success);
        assert!(skep(&["-c", "hive-4", "info"]).success, "its files of TLS came along");
        assert!(skep(&["context", "rm", "hive-3", "hive-4"]).success);
    }
}

#[test]
fn a_daemon_elsewhere_is_reached_by_tls_and_by_ssh_under_a_name() {
    take_turn!();
    let rig = Rig::new(2);
    let (host, other) = (rig.host(1), rig.host(2));
    let (certs, wrong) = (host.dir().join("certs"), host.dir().join("wrong"));
    make_certificates(&certs, host.addr());
    make_certificates(&wrong, host.addr());
    let address = format!("tcp://{}:2376", host.addr());
    let file = |dir: &Path, name: &str| dir.join(name).display().to_string();
    let of_daemon = |name: &str| file(&certs, name);
    let files = ["ca.pem", "server-cert.pem", "server-key.pem"].map(of_daemon);
    let listen =
        ["-H", &address, "--tlsverify", "--tlscacert", &files[0], "--tlscert", &files[1], "--tlskey", &files[2]];
    host.start_daemon_with(&listen);
    host.import_busybox();
    let config = other.dir().join("config");
    let path = format!("PATH={}:/usr/bin:/bin", other.dir().join("bin").display());
    let config_dir = format!("DOCKER_CONFIG={}", config.display());
    let program = program();
    let skep = |args: &[&str]| other.exec("env", &[&[&config_dir, &path, program.to_str().unwrap()], args].concat());
    let says = |args: &[&str], what: &str| {
        let ran = skep(args);
        assert!(!ran.success && ran.stderr.contains(what), "{args:?}: {ran:?}");
    };

    // Who shows no certificate, or one of another CA, is not heard; nor is a daemon of another CA believed.
    let tls = |ca: &Path, own: &Path| {
        let files = [file(ca, "ca.pem"), file(own, "cert.pem"), file(own, "key.pem")];
        let flags = ["--tlsverify", "--tlscacert", &files[0], "--tlscert", &files[1], "--tlskey", &files[2]];
        flags.iter().map(|&flag| flag.to_owned()).chain(["-H".into(), address.clone(), "ps".into()]).collect::<Vec<_>>()
    };
    let by = |flags: &[String]| skep(&flags.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(by(&tls(&certs, &certs)).success);
    assert!(!by(&tls(&certs, &wrong)).success);
    let unbelieved = by(&tls(&wrong, &certs));
    assert!(!unbelieved.success && unbelieved.stderr.contains("certificate"), "{unbelieved:?}");
    says(&["-H", &address, "ps"], "not reached");
    says(&["--tls", "-H", &address, "ps"], "not reached");

    // Under a name, for both clients; streams go both ways.
    let endpoint = format!(
        "host={address},ca={},cert={},key={}",
        of_daemon("ca.pem"),
        of_daemon("cert.pem"),
        of_daemon("key.pem")
    );
    assert!(skep(&["context", "create", "hive", "--description", "bees", "--docker", &endpoint]).success);
    assert_eq!(skep(&["-c", "hive", "run", "--rm", "busybox", "echo", "hum"]).stdout, "hum\n");
    assert!(skep(&["context", "use", "hive"]).success);
    assert_eq!(skep(&["info", "-f", "{{.Name}}"]).stdout.trim(), host.name());
    assert!(skep(&["context", "ls"]).stdout.lines().any(|line| line.starts_with("hive *") && line.contains(&address)));
    if has_docker() {
        let docker = other.exec("env", &[&config_dir, "docker", "info", "-f", "{{.Name}}"]);
        assert_eq!(docker.stdout.trim(), host.name(), "{docker:?}");
    }
    says(&["context", "create", "hive", "--docker", &endpoint], "already exists");
    says(&["context", "rm", "hive"], "in use");
    says(&["-c", "comb", "ps"], "comb");
    says(&["-c", "hive", "-H", &address, "ps"], "conflicting");

    serve_ssh(&rig);
    let ssh = format!("host=ssh://root@{}:2222", host.addr());
    assert!(skep(&["context", "create", "far", "--docker", &ssh]).success);
    wait_until("the daemon is reached by SSH", LIMIT, || {
        let ran = skep(&["-c", "far", "run", "--rm", "busybox", "echo", "from afar"]);
        (ran.stdout == "from afar\n", format!("{ran:?}"))
    });
    packed_contexts_are_taken_in(&skep, (other, &config_dir), &address);
    assert!(skep(&["context", "rm", "--force", "hive", "far"]).success);
    assert_eq!(skep(&["context", "show"]).stdout, "default\n");
}

/// Has host 1 serve SSH, with our client on its path; host 2's ssh has a key for it. By dropbear, whose
/// package brings programs and no service.
fn serve_ssh(rig: &Rig) {
    let (host, other) = (rig.host(1), rig.host(2));
    let (dir, bin) = (host.dir().join("ssh"), other.dir().join("bin"));
    std::fs::create_dir_all(dir.join("home/.ssh")).unwrap();
    std::fs::create_dir(&bin).unwrap();
    let at = |name: &str| dir.join(name).display().to_string();
    let script = |path: &Path, text: String| {
        std::fs::write(path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    assert!(host.exec("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", &at("client")]).success);
    assert!(host.exec("dropbearkey", &["-t", "ed25519", "-f", &at("host")]).success);
    std::os::unix::fs::symlink(program(), dir.join("skep")).unwrap();
    let path = format!("PATH={}:/usr/bin:/bin SKEP_HOST={}", dir.display(), host.socket());
    script(&dir.join("login"), format!("#!/bin/sh\nexport {path}\nexec sh -c \"$SSH_ORIGINAL_COMMAND\"\n"));
    let key = std::fs::read_to_string(dir.join("client.pub")).unwrap();
    std::fs::write(dir.join("home/.ssh/authorized_keys"), format!("command=\"{}\" {key}", at("login"))).unwrap();
    for (path, mode) in [("home", 0o700), ("home/.ssh", 0o700), ("home/.ssh/authorized_keys", 0o600)] {
        std::fs::set_permissions(dir.join(path), std::fs::Permissions::from_mode(mode)).unwrap();
    }
    // Root's home, in the host's own namespace alone.
    assert!(host.exec("mount", &["--bind", &at("home"), "/root"]).success);
    host.spawn("dropbear", &["-F", "-s", "-r", &at("host"), "-p", &format!("{}:2222", host.addr()), "-P", &at("pid")]);
    let options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -q";
    script(&bin.join("ssh"), format!("#!/bin/sh\nexec /usr/bin/ssh -i {} {options} \"$@\"\n", at("client")));
}

#[test]
fn an_audit_names_what_stands_against_a_host() {
    take_turn!();
    let rig = Rig::swarm(1, 1);
    let host = rig.host(1);
    host.ok(&["run", "-d", "--name", "open", "--privileged", "-p", "80:8000", "-v", "/etc:/host", "skep/whoami"]);
    let findings = || -> serde_json::Value { serde_json::from_str(&host.ok(&["audit", "--json"])).unwrap() };
    let result = |id: &str| {
        let all = findings();
        let found = all.as_array().unwrap().iter().find(|finding| finding["ID"] == id).unwrap().clone();
        (found["Result"].as_str().unwrap().to_owned(), found["Detail"].as_str().unwrap().to_owned())
    };
    for id in ["5.4", "5.5", "5.7", "5.13", "5.29"] {
        let (found, detail) = result(id);
        assert!(found == "WARN" && detail.starts_with("open: "), "{id}: {found} {detail}");
    }
    for id in ["2.5", "2.14", "2.15", "3.16", "5.9", "5.21", "7.1", "7.3", "7.7"] {
        let wanted = if id == "2.5" { "WARN" } else { "PASS" };
        assert_eq!(result(id).0, wanted, "{id}: the rig's registry is spoken to without TLS, and nothing else");
    }
    assert!(!host.run(&["audit", "--strict"]).success && host.run(&["audit"]).success);
    host.ok(&["network", "create", "-d", "overlay", "--opt", "encrypted=false", "plain"]);
    assert!(result("7.3").1.starts_with("plain: "));
    host.ok(&["rm", "-f", "open"]);
    host.ok(&["network", "rm", "plain"]);
}

/// Commands and flags of docker's client 28 that `skep` does not have, and why: they come with what they are for, belong to other
/// systems than Linux, or are experiments of docker's.
const NOT_TAKEN: &[(&str, &[&str])] = &[
    // What they are for is refused by the daemon, too.
    ("checkpoint", &[]),
    ("plugin", &[]),
    ("manifest", &[]),
    ("trust", &[]),
    ("swarm ca", &["external-ca"]),
    ("secret create", &["driver"]),
    ("service create", &["credential-spec", "isolation"]),
    ("service update", &["credential-spec", "isolation"]),
    ("container start", &["checkpoint", "checkpoint-dir"]),
    ("image ls", &["tree"]),
    ("container run", REAL_TIME_AND_WINDOWS),
    ("container create", REAL_TIME_AND_WINDOWS),
    ("container update", &["cpu-rt-period", "cpu-rt-runtime"]),
];

const REAL_TIME_AND_WINDOWS: &[&str] =
    &["cpu-count", "cpu-percent", "cpu-rt-period", "cpu-rt-runtime", "io-maxbandwidth", "io-maxiops", "use-api-socket"];

/// Commands that stand alone are the same as those of a group.
fn in_its_group(command: &str) -> &str {
    match command {
        "images" => "image ls",
        "run" => "container run",
        "create" => "container create",
        "start" => "container start",
        "update" => "container update",
        other => other,
    }
}

/// The commands and flags that a help text lists.
fn listed(help: &str) -> (Vec<String>, Vec<String>) {
    let (mut commands, mut flags, mut in_commands) = (Vec::new(), Vec::new(), false);
    for line in help.lines() {
        if !line.is_empty() && !line.starts_with(' ') {
            in_commands = line.ends_with("Commands:");
        }
        let first = line.strip_prefix("  ").filter(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()));
        if let Some(name) = first.filter(|_| in_commands).and_then(|rest| rest.split_whitespace().next()) {
            commands.push(name.trim_end_matches('*').to_owned());
        }
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let flag = if first.len() == 3 && first.ends_with(',') { words.next() } else { Some(first) };
        // A line may also begin with a flag that the text before speaks of.
        let flag = flag.and_then(|word| word.strip_prefix("--")).filter(|flag| !flag.ends_with([')', '.']));
        flags.extend(flag.map(|flag| flag.trim_end_matches(',').to_owned()).filter(|_| line.starts_with(' ')));
    }
    (commands, flags)
}

#[test]
fn what_the_docker_client_takes_is_taken() {
    if !has_docker() {
        return;
    }
    let run = |program: &std::ffi::OsStr, args: &[&str]| {
        let output = std::process::Command::new(program).args(args).output().unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    let version = run("docker".as_ref(), &["--version"]);
    if !version.contains("version 28.") {
        eprintln!("SKIPPED: the list is of docker's client 28, and this is {version}");
        return;
    }
    let skep = program();
    let (mut open, mut missing, mut taken, mut seen) = (vec![String::new()], Vec::new(), Vec::new(), 0);
    while let Some(command) = open.pop() {
        let words: Vec<&str> = command.split_whitespace().collect();
        let exceptions = NOT_TAKEN.iter().find(|(name, _)| *name == in_its_group(&command)).map(|(_, flags)| *flags);
        if exceptions == Some(&[]) {
            continue;
        }
        let (commands, flags) = listed(&run("docker".as_ref(), &[&words[..], &["--help"]].concat()));
        seen += flags.len();
        let plugins = ["buildx", "compose", "scan"];
        open.extend(commands.iter().filter(|name| !plugins.contains(&name.as_str())).map(|name| match words.len() {
            0 => name.clone(),
            _ => format!("{command} {name}"),
        }));
        let help = run(skep.as_os_str(), &[&words[..], &["--help"]].concat());
        if help.contains("unrecognized subcommand") {
            missing.push(command);
            continue;
        }
        let known = listed(&help).1;
        for flag in flags {
            let excepted = exceptions.is_some_and(|flags| flags.contains(&flag.as_str()));
            // Those of no effect are taken though no help tells of them.
            let is_unknown = || {
                let flag = format!("--{flag}");
                let asking = [&["-H", "unix:///nowhere"], &words[..], &[&flag]].concat();
                run(skep.as_os_str(), &asking).contains("unexpected argument")
            };
            match (known.contains(&flag) || !is_unknown(), excepted) {
                (true, true) => taken.push(format!("{command} --{flag}")),
                (false, false) => missing.push(format!("{command} --{flag}")),
                _ => {}
            }
        }
    }
    assert!(taken.is_empty(), "on the list, but taken: {taken:#?}");
    assert!(missing.is_empty(), "not taken: {missing:#?}");
    assert!(seen > 500, "docker's help was not understood: it has {seen} flags");
}

#[test]
fn images_and_space_are_shown_in_full() {
    take_turn!();
    let rig = one_host();
    let host = rig.host(1);
    // An archive that the daemon fetches itself.
    host.ok(&["run", "--name", "made", "-v", "data:/data", "box", "sh", "-c", "echo honey > /jar"]);
    host.ok(&["export", "-o", &host.dir().join("jar.tar").display().to_string(), "made"]);
    let dir = host.dir().display().to_string();
    host.spawn("busybox", &["httpd", "-f", "-p", "127.0.0.1:8099", "-h", &dir]);
    let url = "http://127.0.0.1:8099/jar.tar";
    wait_until("the archive is served", LIMIT, || {
        let ran = host.run(&["import", "--platform", "linux/arm64", "-c", "CMD [\"cat\", \"/jar\"]", url, "fetched"]);
        (ran.success, ran.stderr)
    });
    assert_eq!(host.ok(&["inspect", "-f", "{{.Architecture}} {{.Config.Cmd}}", "fetched"]).trim(), "arm64 [cat /jar]");
    let other = host.fails(&["image", "inspect", "--platform", "linux/amd64", "fetched"]);
    assert!(
        other.contains("does not match the specified platform: wanted linux/amd64, actual: linux/arm64"),
        "{other}"
    );
    let summary = host.ok(&["system", "df"]);
    assert!(summary.contains("RECLAIMABLE") && summary.contains("Local Volumes"), "{summary}");
    let all = host.ok(&["system", "df", "-v"]);
    for want in ["Images space usage:", "fetched:latest", "Containers space usage:", "made", "VOLUME NAME", "data"] {
        assert!(all.contains(want), "{want}: {all}");
    }
    // Limits of a build's steps.
    let context = tempfile::tempdir().unwrap();
    std::fs::write(context.path().join("Dockerfile"), "FROM box\nRUN ulimit -n > /limit\nCMD cat /limit\n").unwrap();
    host.ok(&["builder", "build", "-t", "limited", "--ulimit", "nofile=77:77", context.path().to_str().unwrap()]);
    assert_eq!(host.ok(&["run", "--rm", "limited"]).trim(), "77");
    let steps = host.ok(&["history", "--no-trunc", "--human=false", "limited"]);
    assert!(steps.contains("CREATED AT") && steps.contains("/bin/sh -c ulimit -n > /limit"), "{steps}");
    let refused = host.fails(&["build", "--security-opt", "seccomp=unconfined", context.path().to_str().unwrap()]);
    assert!(refused.contains("security-opt is not supported"), "{refused}");
    // One stream of several.
    let say = ["sh", "-c", "echo out; echo err >&2"];
    let ran = host.run(&[&["run", "--rm", "-a", "stderr", "box"], &say[..]].concat());
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("", "err\n"));
    assert!(host.fails(&["search", "honey"]).contains("Docker Hub"));
}

#[test]
fn what_goes_out_goes_through_the_network_of_the_highest_priority() {
    take_turn!();
    let rig = one_host();
    let host = rig.host(1);
    for (network, subnet) in [("low", "10.81.0.0/24"), ("high", "10.82.0.0/24"), ("higher", "10.83.0.0/24")] {
        host.ok(&["network", "create", "-d", "bridge", "--subnet", subnet, network]);
    }
    let high = "name=high,gw-priority=5,alias=top,ip=10.82.0.9";
    host.ok(&["run", "-d", "--name", "tall", "--network", "low", "--network", high, "box", "sleep", "600"]);
    let way = || host.ok(&["exec", "tall", "ip", "route", "show", "default"]);
    assert!(way().contains("via 10.82.0.1 "), "{}", way());
    let place = "{{with .NetworkSettings.Networks.high}}{{.GwPriority}} {{.IPAddress}} {{.Aliases}}{{end}}";
    assert_eq!(host.ok(&["inspect", "-f", place, "tall"]).trim(), "5 10.82.0.9 [top]");
    host.ok(&["network", "connect", "--gw-priority", "7", "higher", "tall"]);
    assert!(way().contains("via 10.83.0.1 "), "{}", way());
    host.ok(&["network", "disconnect", "higher", "tall"]);
    assert!(way().contains("via 10.82.0.1 "), "{}", way());
    host.ok(&["restart", "-t", "0", "tall"]);
    assert!(way().contains("via 10.82.0.1 "), "{}", way());
    let twice = host.fails(&["run", "--network", high, "--ip", "10.82.0.8", "box", "true"]);
    assert!(twice.contains("conflicting options"), "{twice}");
}
