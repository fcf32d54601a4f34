//! What a device answers to the commands that ask something.

use plist::{Dictionary, Value};

use super::{Device, Product};

impl Device {
    pub(super) fn device_name(&self) -> String {
        match self.product {
            Product::Mac => format!("Simulated MacBook {}", self.number),
            Product::Iphone => format!("Simulated iPhone {}", self.number),
            Product::Ipad => format!("Simulated iPad {}", self.number),
        }
    }

    pub(super) const fn os_version(&self) -> &'static str {
        match self.product {
            Product::Mac => "15.6.1",
            Product::Iphone | Product::Ipad => "18.6.2",
        }
    }

    pub(super) const fn build_version(&self) -> &'static str {
        match self.product {
            Product::Mac => "24G90",
            Product::Iphone | Product::Ipad => "22G100",
        }
    }

    pub(super) const fn model(&self) -> &'static str {
        match self.product {
            Product::Mac => "Z1BT0009JD/A",
            Product::Iphone => "MTUV3ZD/A",
            Product::Ipad => "MVX63FD/A",
        }
    }

    pub(super) const fn model_name(&self) -> &'static str {
        match self.product {
            Product::Mac => "MacBook Air",
            Product::Iphone => "iPhone",
            Product::Ipad => "iPad",
        }
    }

    pub(super) const fn product_name(&self) -> &'static str {
        match self.product {
            Product::Mac => "Mac15,12",
            Product::Iphone => "iPhone16,1",
            Product::Ipad => "iPad14,10",
        }
    }

    /// The keys that an acknowledgement of this command carries beside the usual ones.
    pub(super) fn answer_to(&self, request_type: &str, command: &Dictionary) -> Dictionary {
        let mut answer = Dictionary::new();
        match request_type {
            "DeviceInformation" => {
                answer.insert("QueryResponses".into(), self.query_responses(command));
            }
            "ProfileList" => {
                answer.insert("ProfileList".into(), self.profile_list());
            }
            "SecurityInfo" => {
                answer.insert("SecurityInfo".into(), self.security_info());
            }
            "InstalledApplicationList" => {
                answer.insert("InstalledApplicationList".into(), applications());
            }
            "CertificateList" => {
                let mut certificate = Dictionary::new();
                certificate.insert("CommonName".into(), self.serial_number.as_str().into());
                certificate.insert("Data".into(), Value::Data(self.identity.certificate.to_vec()));
                certificate.insert("IsIdentity".into(), true.into());
                answer.insert("CertificateList".into(), Value::Array(vec![Value::Dictionary(certificate)]));
            }
            "ProvisioningProfileList" => {
                answer.insert("ProvisioningProfileList".into(), Value::Array(Vec::new()));
            }
            _ => {}
        }
        answer
    }

    fn query_responses(&self, command: &Dictionary) -> Value {
        let asked = command.get("Queries").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_string);
        let mut responses = Dictionary::new();
        for query in asked {
            // What a device does not know it leaves out.
            if let Some(value) = self.query(query) {
                responses.insert(query.into(), value);
            }
        }
        responses.sort_keys();
        Value::Dictionary(responses)
    }

    fn query(&self, query: &str) -> Option<Value> {
        Some(match query {
            "UDID" if !self.is_user_enrollment() => self.udid.as_str().into(),
            "SerialNumber" if !self.is_user_enrollment() => self.serial_number.as_str().into(),
            "DeviceName" => self.device_name().into(),
            "OSVersion" => self.os_version().into(),
            "BuildVersion" => self.build_version().into(),
            "Model" => self.model().into(),
            "ModelName" => self.model_name().into(),
            "ProductName" => self.product_name().into(),
            "IsSupervised" => (!self.is_user_enrollment()).into(),
            "IsMultiUser" => false.into(),
            "DeviceCapacity" => Value::Real(256.0),
            "AvailableDeviceCapacity" => Value::Real(187.5),
            "BatteryLevel" => Value::Real(0.83),
            "AwaitingConfiguration" => self.awaiting_configuration?.into(),
            "HostName" | "LocalHostName" if self.product == Product::Mac => format!("simulated-{}", self.number).into(),
            "WiFiMAC" if !self.is_user_enrollment() => {
                let [.., third, second, first] = self.number.to_be_bytes();
                format!("02:00:00:{third:02x}:{second:02x}:{first:02x}").into()
            }
            _ => return None,
        })
    }

    fn profile_list(&self) -> Value {
        let managed = self.profiles.iter().map(|identifier| {
            let mut profile = Dictionary::new();
            profile.insert("PayloadIdentifier".into(), identifier.as_str().into());
            profile.insert("IsManaged".into(), true.into());
            Value::Dictionary(profile)
        });
        let mut enrollment = Dictionary::new();
        enrollment.insert("PayloadDisplayName".into(), "Enrollment".into());
        enrollment.insert("PayloadIdentifier".into(), "example.enrollment".into());
        enrollment.insert("PayloadVersion".into(), 1.into());
        enrollment.insert("IsEncrypted".into(), false.into());
        enrollment.insert("IsManaged".into(), true.into());
        Value::Array(std::iter::once(Value::Dictionary(enrollment)).chain(managed).collect())
    }

    fn security_info(&self) -> Value {
        let mut information = Dictionary::new();
        match self.product {
            Product::Mac => {
                information.insert("FDE_Enabled".into(), true.into());
                information.insert("FDE_HasInstitutionalRecoveryKey".into(), false.into());
                information.insert("FDE_HasPersonalRecoveryKey".into(), true.into());
                information.insert("SystemIntegrityProtectionEnabled".into(), true.into());
                let mut firewall = Dictionary::new();
                firewall.insert("FirewallEnabled".into(), true.into());
                firewall.insert("BlockAllIncoming".into(), false.into());
                firewall.insert("StealthMode".into(), false.into());
                information.insert("FirewallSettings".into(), Value::Dictionary(firewall));
            }
            Product::Iphone | Product::Ipad => {
                information.insert("HardwareEncryptionCaps".into(), 3.into());
                information.insert("PasscodePresent".into(), true.into());
                information.insert("PasscodeCompliant".into(), true.into());
                information.insert("PasscodeCompliantWithProfiles".into(), true.into());
            }
        }
        Value::Dictionary(information)
    }
}

/// As many as a new device has: 60.
fn applications() -> Value {
    Value::Array(
        (0..60)
            .map(|number| {
                let mut application = Dictionary::new();
                application.insert("BundleSize".into(), (1_048_576 * (number + 1)).into());
                application.insert("DynamicSize".into(), (4096 * number).into());
                application.insert("Identifier".into(), format!("example.application.number{number}").into());
                application.insert("Installing".into(), false.into());
                application.insert("Name".into(), format!("Application {number}").into());
                application.insert("ShortVersion".into(), format!("{number}.1").into());
                application.insert("Version".into(), format!("{number}.1.0").into());
                Value::Dictionary(application)
            })
            .collect(),
    )
}

/// The identifier of an unsigned profile in an `InstallProfile` command.
pub(super) fn profile_identifier(command: &Dictionary) -> Option<String> {
    let payload = command.get("Payload").and_then(Value::as_data)?;
    let profile = Value::from_reader(std::io::Cursor::new(payload)).ok()?;
    profile.as_dictionary()?.get("PayloadIdentifier")?.as_string().map(Into::into)
}
