//! What the nodes of a swarm trust each other by: another root certificate, under a swarm that goes on.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};
use skep_chaos_tests::{Host, LIMIT, Rig, take_turn, wait_until};

fn swarm_of(host: &Host) -> Value {
    serde_json::from_str(&host.ok(&["swarm", "inspect", "--format", "{{json .}}"])).unwrap()
}

fn token_of(host: &Host, role: &str) -> String {
    host.ok(&["swarm", "join-token", "-q", role]).trim().to_owned()
}

fn certificate(host: &Host, name: &str) -> PathBuf {
    host.data().join("swarm/certificates").join(name)
}

/// The trusted root of every node, as their own files have it.
fn roots<'a>(hosts: impl IntoIterator<Item = &'a Host>) -> BTreeSet<String> {
    hosts.into_iter().map(|host| std::fs::read_to_string(certificate(host, "swarm-root-ca.crt")).unwrap()).collect()
}

fn openssl(args: &[&str]) -> bool {
    Command::new("openssl").args(args).output().unwrap().status.success()
}

/// Whether a node's certificate is one of the root that it trusts, with nothing between them.
fn is_signed_by_its_root(host: &Host) -> bool {
    let [root, own] = ["swarm-root-ca.crt", "swarm-node.crt"].map(|name| certificate(host, name).display().to_string());
    openssl(&["verify", "-CAfile", &root, &own])
}

fn await_root(rig: &Rig) {
    wait_until("every node has a certificate of the root in force and trusts it", LIMIT, || {
        let swarm = swarm_of(rig.host(1));
        let root = swarm["TLSInfo"]["TrustRoot"].as_str().unwrap().to_owned();
        let seen = roots(rig.hosts());
        let signed = rig.hosts().all(is_signed_by_its_root);
        (swarm["RootRotationInProgress"] == false && seen == [root].into() && signed, format!("{swarm} {seen:?}"))
    });
}

#[test]
fn the_root_is_changed_once_every_node_has_a_certificate_of_the_next_one() {
    take_turn!();
    let rig = Rig::new(5);
    rig.hosts().for_each(Host::start_daemon);
    let (first, worker, late) = (rig.host(1), rig.host(4), rig.host(5));
    first.ok(&["swarm", "init", "--advertise-addr", first.addr()]);
    let target = format!("{}:2377", first.addr());
    let join = |host: &Host, token: &str| {
        host.run(&["swarm", "join", "--token", token, "--advertise-addr", host.addr(), &target])
    };
    for (number, role) in [(2, "manager"), (3, "manager"), (4, "worker")] {
        assert!(join(rig.host(number), &token_of(first, role)).success);
    }
    first.ok(&["service", "create", "-d", "--name", "web", "--replicas", "4", "-p", "8080:8000", "skep/whoami"]);
    first.await_replicas("web", "4/4");
    let members = || (1..=4).map(|number| rig.host(number)).collect::<Vec<_>>();
    let tasks: Vec<_> = (1..=3).flat_map(|number| rig.host(number).running()).collect();
    let (before, token) = (roots(members()), token_of(first, "worker"));

    // One that is away holds it up, and is named; the others have their certificates.
    worker.kill_daemon();
    wait_until("the worker is missed", LIMIT, || {
        let list = first.ok(&["node", "ls", "--format", "{{.Hostname}} {{.Status}}"]);
        (list.contains("n4 Down"), list)
    });
    rig.host(2).ok(&["swarm", "ca", "--rotate", "-d"]);
    wait_until("the managers have certificates of the next root", LIMIT, || {
        let swarm = swarm_of(first);
        let wanted = swarm["TLSInfo"]["CertIssuerPublicKey"].as_str().unwrap().to_owned();
        let list = first.ok(&[
            "node",
            "inspect",
            "--format",
            "{{.Description.TLSInfo.CertIssuerPublicKey}}",
            "n1",
            "n2",
            "n3",
        ]);
        (swarm["RootRotationInProgress"] == true && list.lines().all(|key| key == wanted), list)
    });
    assert_eq!((roots(members()), token_of(first, "worker")), (before.clone(), token.clone()));
    let asked = first.exec(
        "timeout",
        &["3", skep_chaos_tests::program().to_str().unwrap(), "-H", &first.socket(), "swarm", "ca", "--rotate"],
    );
    assert!(asked.stderr.contains("waiting for n4, down"), "{asked:?}");
    // Meanwhile the swarm takes in nodes, and its leader may go.
    assert!(join(late, &token).success);
    rig.host(rig.leader(1)).kill_daemon();
    let up = (1..=3).map(|number| rig.host(number)).find(|host| host.run(&["version"]).success).unwrap();
    wait_until("it goes on without its leader", LIMIT, || {
        let ran = up.run(&["service", "update", "-d", "--label", "a=1", "web"]);
        (ran.success, ran.stderr)
    });
    (1..=3).map(|number| rig.host(number)).filter(|host| !host.run(&["version"]).success).for_each(Host::start_daemon);
    worker.start_daemon();
    await_root(&rig);
    assert!(roots(rig.hosts()).is_disjoint(&before));

    // Tokens name the root: the old ones lead nowhere.
    late.ok(&["swarm", "leave"]);
    let refused = join(late, &token);
    assert!(refused.stderr.contains("does not match fingerprint"), "{refused:?}");
    assert!(join(late, &token_of(first, "worker")).success);
    // All of it is on the disks; no task has noticed, but that of the node that was down.
    for host in rig.hosts() {
        host.kill_daemon();
        host.start_daemon();
    }
    first.await_replicas("web", "4/4");
    let now = rig.running();
    assert!(tasks.iter().all(|task| now.contains(task)), "{tasks:?} {now:?}");
    assert!(late.curl(&format!("http://{}:8080/", worker.addr())).contains("Hostname"), "the mesh goes on");
}

#[test]
fn a_root_of_one_s_own_is_taken_if_it_is_one() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    let first = rig.host(1);
    let file = |name: &str| first.dir().join(name).display().to_string();
    let make = |name: &str, subject: &str, extra: &[&str]| {
        let (key, cert) = (file(&format!("{name}.key")), file(&format!("{name}.crt")));
        let usual = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"];
        assert!(openssl(&[&usual[..], &["-keyout", &key, "-out", &cert, "-subj", subject], extra].concat()));
        (cert, key)
    };
    let (good, key) = make("good", "/C=CH/O=Example/CN=Our root", &[]);
    let (leaf, leaf_key) = make("leaf", "/CN=no CA", &["-addext", "basicConstraints=critical,CA:FALSE"]);
    let (twice, twice_key) = make("twice", "/OU=a/OU=b/CN=twice", &[]);
    std::fs::write(file("both.crt"), [std::fs::read(&good).unwrap(), std::fs::read(&leaf).unwrap()].concat()).unwrap();
    std::fs::write(file("junk"), "junk").unwrap();
    let before = swarm_of(first)["TLSInfo"].clone();
    for (cert, key, why) in [
        (&leaf, &leaf_key, "it is not that of a CA"),
        (&good, &leaf_key, "the key is another one's"),
        (&twice, &twice_key, "its name has a part twice"),
        (&file("both.crt"), &key, "exactly one certificate"),
        (&file("junk"), &key, "exactly one certificate"),
        (&good, &file("junk"), "the key is no private key"),
        (&file("nothing"), &key, "cannot be read"),
    ] {
        let told = first.fails(&["swarm", "ca", "--rotate", "--ca-cert", cert, "--ca-key", key]);
        assert!(told.contains(why), "{cert}: {told}");
    }
    assert!(first.fails(&["swarm", "ca", "--rotate", "--ca-cert", &good]).contains("--ca-key"));
    assert_eq!(swarm_of(first)["TLSInfo"], before);

    let shown = first.ok(&["swarm", "ca", "--rotate", "--ca-cert", &good, "--ca-key", &key]);
    assert_eq!(shown.trim(), std::fs::read_to_string(&good).unwrap().trim());
    await_root(&rig);
    // What is told holds no key; to send it back with another setting changes nothing of the root.
    let told = swarm_of(first);
    assert!(told["Spec"]["CAConfig"].get("SigningCAKey").is_none(), "{told}");
    first.ok(&["swarm", "update", "--task-history-limit", "3"]);
    assert_eq!(swarm_of(first)["TLSInfo"], told["TLSInfo"]);
    if first.exec("docker", &["--version"]).success {
        let shown = first.docker(&["swarm", "ca", "--rotate"]);
        assert!(shown.contains("BEGIN CERTIFICATE") && shown.trim() != std::fs::read_to_string(&good).unwrap().trim());
        await_root(&rig);
    }
    // Keys as tools wrote them before there was one form for all; the last is the first one's, once more.
    let (rsa, rsa_key) = (file("rsa.crt"), file("rsa.key"));
    let new = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=rsa"];
    assert!(openssl(&[&new[..], &["-keyout", &rsa_key, "-out", &rsa]].concat()));
    for (kind, cert, key) in [("rsa", &rsa, &rsa_key), ("ec", &good, &key)] {
        let old = file(&format!("{kind}.old"));
        let form: &[&str] = if kind == "rsa" { &["-traditional"] } else { &[] };
        assert!(openssl(&[&[kind, "-in", key, "-out", &old][..], form].concat()));
        assert!(std::fs::read_to_string(&old).unwrap().contains(&format!("BEGIN {} PRIVATE KEY", kind.to_uppercase())));
        first.ok(&["swarm", "ca", "--rotate", "--ca-cert", cert, "--ca-key", &old, "-q"]);
        await_root(&rig);
    }
    assert_eq!(
        swarm_of(first)["TLSInfo"]["TrustRoot"].as_str().unwrap().trim(),
        std::fs::read_to_string(&good).unwrap().trim()
    );
}

#[test]
fn a_swarm_is_made_or_recovered_as_its_settings_say() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    let file = |name: &str| host.dir().join(name).display().to_string();
    let usual = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"];
    let (cert, key) = (file("own.crt"), file("own.key"));
    assert!(openssl(&[&usual[..], &["-keyout", &key, "-out", &cert, "-subj", "/CN=own"]].concat()));
    let [cert, key] = [cert, key].map(|path| std::fs::read_to_string(path).unwrap());
    let init = |force: bool, spec: Value| {
        let body =
            json!({"ListenAddr": "0.0.0.0:2377", "AdvertiseAddr": host.addr(), "ForceNewCluster": force, "Spec": spec});
        host.api().post("/swarm/init", &body).unwrap()
    };
    // A root that is none leaves no swarm behind.
    let refused = init(false, json!({"CAConfig": {"SigningCACert": "junk", "SigningCAKey": key}}));
    assert!(refused.status == 400 && refused.body.to_string().contains("certificate"), "{refused:?}");
    assert!(host.fails(&["node", "ls"]).contains("not a swarm manager"));

    let spec = json!({"CAConfig": {"SigningCACert": cert, "SigningCAKey": key},
        "TaskDefaults": {"LogDriver": {"Name": "none"}}, "Labels": {"a": "b"}});
    assert_eq!(init(false, spec).status, 200);
    let swarm = swarm_of(host);
    assert_eq!(swarm["TLSInfo"]["TrustRoot"].as_str().unwrap().trim(), cert.trim());
    await_root(&rig);
    // Tasks whose services do not say have the swarm's log driver.
    host.ok(&["service", "create", "-d", "--name", "quiet", "skep/whoami"]);
    host.ok(&["service", "create", "-d", "--name", "loud", "--log-driver", "local", "skep/whoami"]);
    for (service, driver) in [("quiet", "none"), ("loud", "local")] {
        host.await_replicas(service, "1/1");
        let id = host.ok(&["ps", "-q", "--filter", &format!("name={service}.")]);
        assert_eq!(host.ok(&["inspect", "-f", "{{.HostConfig.LogConfig.Type}}", id.trim()]).trim(), driver);
    }

    // A recovery takes in what is said, and leaves the rest.
    assert_eq!(init(true, json!({"EncryptionConfig": {"AutoLockManagers": true}})).status, 200);
    assert!(host.ok(&["swarm", "unlock-key", "-q"]).starts_with("SWMKEY-1-"));
    let spec = &swarm_of(host)["Spec"];
    assert_eq!(spec["TaskDefaults"]["LogDriver"]["Name"], "none");
    assert_eq!(spec["Labels"], json!({"a": "b"}));
    host.await_replicas("quiet", "1/1");
}
