//! What a holder of a certificate, or anyone, may send to hurt the server.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, StatusCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use wasmdm_simulator::device::Prepared;
use wasmdm_simulator::{Authority, Connection, Device, DeviceOptions, Message, Proof, SignatureForm};

use crate::process::{Home, ServerProcess};

fn connect(server: &ServerProcess) -> Connection {
    Connection::to(&server.url()).unwrap()
}

fn xml(body: &str) -> Bytes {
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<plist version=\"1.0\">{body}</plist>").into()
}

/// A binary property list of hand-made objects.
fn binary(objects: &[Vec<u8>], top: u8) -> Bytes {
    let mut document = b"bplist00".to_vec();
    let mut offsets = Vec::new();
    for object in objects {
        offsets.push(u16::try_from(document.len()).unwrap());
        document.extend_from_slice(object);
    }
    let table = document.len() as u64;
    for offset in offsets {
        document.extend_from_slice(&offset.to_be_bytes());
    }
    document.extend_from_slice(&[0; 6]);
    document.extend_from_slice(&[2, 1]);
    document.extend_from_slice(&(objects.len() as u64).to_be_bytes());
    document.extend_from_slice(&u64::from(top).to_be_bytes());
    document.extend_from_slice(&table.to_be_bytes());
    document.into()
}

fn references_of_no_size() -> Bytes {
    let mut document = binary(&[vec![0xA1, 0]], 0).to_vec();
    let trailer = document.len() - 32;
    document[trailer + 7] = 0;
    document.into()
}

fn bombs() -> Vec<(&'static str, Bytes)> {
    let shared: Vec<Vec<u8>> = (0..15_u8).map(|n| if n == 14 { vec![0x09] } else { [vec![0xAF, 0x10, 16], vec![n + 1; 16]].concat() }).collect();
    vec![
        ("10,000 nested arrays", xml(&format!("{}{}", "<array>".repeat(10_000), "</array>".repeat(10_000)))),
        ("10,000 nested arrays, truncated", xml(&"<array>".repeat(10_000))),
        ("16^14 values by sharing", binary(&shared, 0)),
        ("an array that holds itself", binary(&[vec![0xA1, 0]], 0)),
        ("references of no size", references_of_no_size()),
        ("two arrays that hold each other", binary(&[vec![0xA1, 1], vec![0xA1, 0]], 0)),
        ("a string of 2^62 bytes", binary(&[[vec![0x5F, 0x13], (1_u64 << 62).to_be_bytes().to_vec()].concat()], 0)),
        ("an array of 2^62 members", binary(&[[vec![0xAF, 0x13], (1_u64 << 62).to_be_bytes().to_vec()].concat()], 0)),
        (
            "an entity bomb",
            Bytes::from_static(
                b"<?xml version=\"1.0\"?><!DOCTYPE plist [<!ENTITY a \"aaaaaaaaaa\"><!ENTITY b \"&a;&a;&a;&a;&a;&a;&a;&a;\"><!ENTITY c \"&b;&b;&b;&b;&b;&b;\">]><plist version=\"1.0\"><string>&c;</string></plist>",
            ),
        ),
        ("truncated", Bytes::from_static(b"<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<plist version=\"1.0\"><dict><key>UDID</key><str")),
        ("nothing", Bytes::new()),
        ("OpenStep text", Bytes::from_static(b"{ MessageType = Authenticate; UDID = A; }")),
        ("zeroes", Bytes::from_static(&[0; 4096])),
    ]
}

/// An array that holds itself, or references of no size, ended the process; a string of 2^62 bytes cut the connection; 900 bytes kept it busy for
/// ever. NanoMDM defect 20. Edge case 8.
#[tokio::test]
async fn bombs_get_the_answer_of_the_table_within_a_second_and_the_server_lives() {
    let authority = Authority::new(31).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = connect(&server);
    device.enroll(&mut connection).await.unwrap();
    for (name, body) in bombs() {
        for message in [Message::raw_check_in(body.clone()), Message::raw_report(body.clone())] {
            let prepared = device.prepare(message).unwrap();
            let begin = Instant::now();
            let answer = device.transmit(&mut connection, &prepared).await.unwrap();
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{name}");
            assert!(begin.elapsed() < Duration::from_secs(1), "{name}: {:?}", begin.elapsed());
        }
    }
    assert!(device.poll_until_idle(&mut connection).await.unwrap().commands.is_empty());
}

/// One such body, with any signature, took 433 MiB of memory. NanoMDM defect 10. Edge case 5.
#[tokio::test]
async fn a_body_of_200_mib_is_refused_readably_and_takes_no_memory() {
    const SIZE: usize = 200 << 20;
    let authority = Authority::new(32).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let before = server.resident();
    for chunked in [false, true] {
        for content_type in ["application/x-apple-aspen-mdm-checkin", "application/xml"] {
            let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
            let length = if chunked { "Transfer-Encoding: chunked".to_owned() } else { format!("Content-Length: {SIZE}") };
            let head = format!("PUT /mdm HTTP/1.1\r\nHost: x\r\nMdm-Signature: AAAA\r\nContent-Type: {content_type}\r\n{length}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            let (mut reader, mut writer) = stream.split();
            let send = async {
                let block = vec![b'x'; 1 << 20];
                let mut sent = 0;
                while sent < SIZE {
                    let wrote = async {
                        if chunked {
                            writer.write_all(format!("{:x}\r\n", block.len()).as_bytes()).await?;
                        }
                        writer.write_all(&block).await?;
                        if chunked { writer.write_all(b"\r\n").await } else { Ok(()) }
                    };
                    // A server that stops reading at some time is in its right; the answer must have come through all the same.
                    if wrote.await.is_err() {
                        break;
                    }
                    sent += block.len();
                }
                if chunked {
                    let _ = writer.write_all(b"0\r\n\r\n").await;
                }
            };
            let receive = async {
                let mut head = [0; 12];
                reader.read_exact(&mut head).await.unwrap();
                String::from_utf8_lossy(&head).into_owned()
            };
            let ((), head) = tokio::join!(send, receive);
            assert_eq!(head, "HTTP/1.1 413", "chunked: {chunked}, {content_type}");
        }
    }
    let risen = server.resident().saturating_sub(before);
    assert!(risen < 64 << 20, "resident memory rose by {} MiB", risen >> 20);
}

/// Sends a body of `x` in the given framing, then another request on a connection that is kept, and reads until the server closes.
async fn refused(server: &ServerProcess, head: &str, size: usize, chunked: bool) -> String {
    let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let length = if chunked { "Transfer-Encoding: chunked".to_owned() } else { format!("Content-Length: {size}") };
    stream.write_all(format!("{head}Host: x\r\n{length}\r\n\r\n").as_bytes()).await.unwrap();
    // Written to the end before a byte of the answer is read, as a simple client does it: a server that closed under it would take
    // its own answer back.
    let mut left = size;
    while left > 0 {
        let block = vec![b'x'; left.min(64 << 10)];
        if chunked {
            stream.write_all(format!("{:x}\r\n", block.len()).as_bytes()).await.unwrap();
        }
        stream.write_all(&block).await.unwrap();
        if chunked {
            stream.write_all(b"\r\n").await.unwrap();
        }
        left -= block.len();
    }
    if chunked {
        stream.write_all(b"0\r\n\r\n").await.unwrap();
    }
    if !head.contains("Connection: close") {
        stream.write_all(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    }
    let mut answers = Vec::new();
    stream.read_to_end(&mut answers).await.unwrap();
    String::from_utf8_lossy(&answers).into_owned()
}

/// Edge case 5.
#[tokio::test]
async fn a_body_three_times_too_large_is_answered_413_and_thrown_away() {
    use wasmdm::http::body::{CHECK_IN_LIMIT, COMMAND_LIMIT, REPORT_LIMIT};
    let authority = Authority::new(36).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let basic = format!("Authorization: {}\r\n", crate::api::basic("nanomdm", crate::process::API_KEY));
    let signed = "Mdm-Signature: AAAA\r\n";
    let routes = [("/checkin", signed, CHECK_IN_LIMIT), ("/mdm", signed, REPORT_LIMIT), ("/v1/enqueue/A", basic.as_str(), COMMAND_LIMIT)];
    for (path, headers, limit) in routes {
        for (chunked, last) in [(false, false), (true, false), (false, true), (true, true)] {
            let case = format!("{path}, chunked: {chunked}, Connection: close: {last}");
            let head = format!("PUT {path} HTTP/1.1\r\n{headers}{}", if last { "Connection: close\r\n" } else { "" });
            let answered = tokio::time::timeout(Duration::from_secs(30), refused(&server, &head, 3 * limit, chunked)).await;
            let answers = answered.unwrap_or_else(|_| panic!("{case}: the connection did not end"));
            let statuses: Vec<&str> = answers.split("HTTP/1.1 ").skip(1).filter_map(|answer| answer.get(..3)).collect();
            assert_eq!(statuses, if last { vec!["413"] } else { vec!["413", "200"] }, "{case}: {answers}");
        }
    }
}

/// The report was refused, its command stayed open, and the device was offered the same one again for ever. Edge case 5.
#[tokio::test]
async fn a_command_whose_report_is_too_large_three_times_ends_and_the_queue_goes_on() {
    let authority = Authority::new(41).unwrap();
    let header = http::HeaderName::from_static("client-cert");
    for (proof, flags) in [
        (Proof::default(), &[][..]),
        (Proof::Signature(SignatureForm::MODERN), &[]),
        (Proof::CertificateHeader(header), &["--cert-header", "Client-Cert", "--trusted-proxy", "127.0.0.1"]),
    ] {
        let home = Home::new(&authority.root_pem()).with(flags);
        let server = home.start();
        let mut device = Device::with_options(&authority, 1, DeviceOptions { proof: proof.clone(), ..DeviceOptions::default() }).unwrap();
        let mut connection = connect(&server);
        device.enroll(&mut connection).await.unwrap();
        for uuid in ["A", "B"] {
            crate::api::enqueue(&server, &device.id(), uuid, "InstalledApplicationList").await;
        }
        let idle = device.idle().unwrap();
        let idle = device.prepare(idle).unwrap();
        let mut large = device.report("Acknowledged", "A").unwrap().body.to_vec();
        large.resize(33 << 20, b'\n');
        let large = device.prepare(Message::raw_report(large)).unwrap();
        // The headers of another message: whoever has seen its certificate could send this.
        let forged = Prepared { message: large.message.clone(), headers: idle.headers.clone() };
        let mut sent = vec![&large; 3];
        if !flags.contains(&"--cert-header") {
            sent.splice(0..0, [&forged; 3]);
        }
        for (number, prepared) in sent.iter().enumerate() {
            let offered = device.transmit(&mut connection, &idle).await.unwrap();
            assert!(String::from_utf8_lossy(&offered.body).contains("<string>A</string>"), "{proof:?}, {number}");
            // The server may close it under a body that it refused.
            let mut another = connect(&server);
            assert_eq!(device.transmit(&mut another, prepared).await.unwrap().status, StatusCode::PAYLOAD_TOO_LARGE);
        }
        let offered = device.transmit(&mut connection, &idle).await.unwrap();
        assert!(String::from_utf8_lossy(&offered.body).contains("<string>B</string>"), "{proof:?}");
        home.check(&[]);
    }
}

/// Edge case 6.
#[tokio::test]
async fn a_compressed_body_is_decoded_and_a_bomb_is_not() {
    use std::io::Write as _;
    let authority = Authority::new(35).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut device = Device::new(&authority, 1).unwrap();
    let mut connection = connect(&server);
    device.enroll(&mut connection).await.unwrap();
    let gzip = |body: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(body).unwrap();
        Bytes::from(encoder.finish().unwrap())
    };
    let idle = device.idle().unwrap();
    let mut prepared = device.prepare(idle).unwrap();
    prepared.headers.insert("content-encoding", HeaderValue::from_static("gzip"));
    prepared.message.body = gzip(&prepared.message.body);
    assert_eq!(device.transmit(&mut connection, &prepared).await.unwrap().status, StatusCode::OK);
    prepared.message.body = gzip(&vec![b' '; 40 << 20]);
    assert_eq!(device.transmit(&mut connection, &prepared).await.unwrap().status, StatusCode::PAYLOAD_TOO_LARGE);
    prepared.message.body = Bytes::from_static(b"no gzip at all");
    assert_eq!(device.transmit(&mut connection, &prepared).await.unwrap().status, StatusCode::BAD_REQUEST);
}

/// The id became the name of a file, so that a device wrote outside of the store's folder; one of 300 bytes was a 500. NanoMDM defect 11.
#[tokio::test]
async fn an_id_is_never_a_path() {
    let authority = Authority::new(38).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut connection = connect(&server);
    let all = || {
        let mut files: Vec<_> = walk(home.directory.path()).into_iter().filter(|path| !path.contains("wasmdm.db")).collect();
        files.sort();
        files
    };
    let before = all();
    let mark = format!("escaped-{}", std::process::id());
    let udids = [format!("../../{mark}"), format!("../../../{mark}"), format!("/tmp/{mark}"), "..".into(), "a/b".into(), format!("%2e%2e%2f{mark}")];
    for (number, udid) in udids.into_iter().enumerate() {
        let mut device = Device::new(&authority, number as u64).unwrap();
        device.udid = udid;
        device.enroll(&mut connection).await.unwrap();
        let token = device.set_bootstrap_token(Some(b"token")).unwrap();
        device.insist(&mut connection, token).await.unwrap();
    }
    assert_eq!(all(), before, "nothing of a device's is a file of its own");
    // Above the home too, and above where the server was started.
    let data = std::fs::canonicalize(home.data()).unwrap();
    for folder in data.ancestors().chain(std::env::current_dir().unwrap().ancestors()).chain([std::path::Path::new("/tmp")]) {
        let names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let escaped: Vec<String> = names.filter(|name| name.contains(&mark)).collect();
        assert!(escaped.is_empty(), "{}: {escaped:?}", folder.display());
    }
    let mut device = Device::new(&authority, 9).unwrap();
    device.udid = "U".repeat(300);
    let authenticate = device.authenticate().unwrap();
    assert_eq!(device.send(&mut connection, authenticate).await.unwrap().status, StatusCode::BAD_REQUEST);
}

fn walk(folder: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        found.push(path.to_string_lossy().into_owned());
        if path.is_dir() {
            found.extend(walk(&path));
        }
    }
    found
}

/// A report in binary, behind a byte order mark, or of a command that is not open was a 500 that the device repeated for ever.
/// NanoMDM defect 8. Edge case 3.
#[tokio::test]
async fn a_report_in_any_form_is_answered_and_the_queue_goes_on() {
    let authority = Authority::new(39).unwrap();
    let home = Home::new(&authority.root_pem());
    let server = home.start();
    let mut connection = connect(&server);
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    for uuid in ["A", "B", "C"] {
        crate::api::enqueue(&server, &device.id(), uuid, "ProfileList").await;
    }
    let idle = device.idle().unwrap();
    assert!(!device.insist(&mut connection, idle).await.unwrap().is_empty());
    let binary = device.report("Acknowledged", "A").unwrap().into_binary().unwrap();
    let marked = |report: Message, mark: &[u8]| Message::raw_report([mark, &report.body].concat());
    let reports = [
        (binary, true),
        (marked(device.report("Acknowledged", "B").unwrap(), b"\xef\xbb\xbf"), true),
        (marked(device.report("Acknowledged", "C").unwrap(), b"\n"), false),
        (device.report("Acknowledged", "never queued").unwrap(), false),
    ];
    for (report, another) in reports {
        let prepared = device.prepare(report).unwrap();
        let answer = device.transmit(&mut connection, &prepared).await.unwrap();
        assert_eq!((answer.status, !answer.body.is_empty()), (StatusCode::OK, another));
    }
}

/// A UDID or a User-Agent with a line end in it wrote lines of its own into the log. NanoMDM defect 16.
#[tokio::test]
async fn nothing_that_is_sent_forges_a_line_of_the_log() {
    let authority = Authority::new(40).unwrap();
    let home = Home::new(&authority.root_pem()).with(&["--log-level", "debug"]);
    let server = home.start();
    let mut connection = connect(&server);
    let mut device = Device::new(&authority, 1).unwrap();
    device.enroll(&mut connection).await.unwrap();
    let forged = ["\n", "\r", "\u{85}", "\u{2028}"].map(|end| format!("x{end}FORGED\u{1b}[2J"));
    for text in &forged {
        let dictionary = |entries: &[(&str, &str)]| {
            let entries = entries.iter().map(|(key, value)| ((*key).to_owned(), plist::Value::from(*value)));
            let mut document = Vec::new();
            plist::Value::Dictionary(entries.collect()).to_writer_binary(&mut document).unwrap();
            Bytes::from(document)
        };
        let udid = device.udid.clone();
        let messages = [
            Message::raw_check_in(dictionary(&[("MessageType", text), ("UDID", &udid)])),
            Message::raw_check_in(dictionary(&[("MessageType", "Authenticate"), ("Topic", text), ("UDID", &udid)])),
            Message::raw_check_in(dictionary(&[("MessageType", "CheckOut"), ("UDID", text)])),
            Message::raw_check_in(dictionary(&[("MessageType", "DeclarativeManagement"), ("Endpoint", text), ("UDID", &udid)])),
            Message::raw_check_in(dictionary(&[("MessageType", "GetToken"), ("TokenServiceType", text), ("UDID", &udid)])),
            Message::raw_report(dictionary(&[("Status", text), ("CommandUUID", text), ("UDID", &udid)])),
            Message::raw_report(dictionary(&[("Status", "Acknowledged"), ("CommandUUID", text), ("UDID", &udid)])),
            Message::raw_report(format!("<plist><dict><{text}>")),
            Message::raw_report(format!("<plist><dict><key>UDID</key><string>{udid}</string><key>CommandUUID</key><string>{text}</string><x/>")),
        ];
        for message in messages {
            let mut prepared = device.prepare(message).unwrap();
            // A header cannot hold a line end, but other things that a terminal obeys.
            prepared.headers.insert("user-agent", HeaderValue::from_bytes(b"FORGED\t\xc2\x85FORGED").unwrap());
            device.transmit(&mut connection, &prepared).await.unwrap();
        }
    }
    let log = server.log();
    assert!(log.len() > forged.len(), "{log:#?}");
    for line in log {
        assert!(!line.starts_with("FORGED") && !line.chars().any(|character| character.is_control() && character != '\u{1b}'), "{line:?}");
        assert!(!line.contains("\u{1b}[2J") && !line.contains('\u{2028}'), "{line:?}");
    }
}
