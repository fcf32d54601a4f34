//! What the storage promises, on every database, plain and sealed. A case takes a [`fixture::Database`] and says nothing of which it is; the
//! table at the end of this file runs each case on each.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that fails says where; the exception for tests does not reach the cases and the fixture"
)]

mod audit;
mod certificate_bindings;
mod check;
mod commands;
mod concurrency;
mod effects;
mod enrollments;
mod events;
mod fixture;
mod mass_pushes;
mod migration;
mod outbox;
mod ownership;
mod plugin_key_values;
mod push_certificates;
mod push_failures;
mod renewal;
mod sealing;
mod timers;
mod upgrades;
mod user_verdicts;
mod wakes;

/// Makes tests of each case, on SQLite.
macro_rules! cases {
    ($($module:ident: $($case:ident),+ $(,)?;)+) => {
        mod sqlite {
            $(mod $module {
                $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    let database = crate::fixture::Database::sqlite().await;
                    crate::$module::$case(&database).await;
                    database.assert_sound().await;
                })+
            })+
        }
        mod sealed_sqlite {
            $(mod $module {
                $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    let database = crate::fixture::Database::sealed().await;
                    crate::$module::$case(&database).await;
                    // It opens every value where it stands, so each was sealed for that place.
                    database.assert_sound().await;
                    assert_eq!(database.storage().sealing_census().await.unwrap().plain, 0);
                })+
            })+
        }
    };
}

cases! {
    migration:
        what_is_brought_counts_as_if_the_device_had_enrolled_here_and_nothing_is_emitted,
        the_same_message_again_changes_nothing,
        a_message_that_comes_before_what_it_needs_is_refused,
        a_device_that_enrolled_here_is_not_touched_by_what_is_brought,
        what_a_device_that_came_with_its_old_certificate_has_not_said_is_still_taken,
        a_device_that_enrolled_anew_with_the_other_server_begins_anew_here,
        an_authenticate_of_a_migrated_device_is_a_re_enrollment,
        other_messages_than_those_that_are_kept_are_refused;
    enrollments:
        only_the_first_token_update_enrolls,
        a_user_channel_comes_with_its_first_token_update,
        a_user_of_a_device_that_is_not_enrolled_is_refused,
        another_topic_than_that_of_authenticate_is_refused,
        a_token_update_after_check_out_is_refused_until_a_new_authenticate,
        re_enrolling_clears_queue_tokens_tally_and_users,
        a_first_authenticate_that_is_sent_again_is_no_re_enrollment,
        awaiting_configuration_of_an_earlier_enrollment_is_forgotten,
        an_absent_unlock_token_keeps_the_old_one,
        an_unlock_token_is_kept_of_a_devices_own_channel_only,
        who_leaves_or_begins_anew_is_no_failing_push_any_more,
        why_a_policy_decided_stands_in_sealed_places_only,
        awaiting_configuration_is_set_and_released,
        an_empty_bootstrap_token_deletes_it,
        check_out_disables_the_device_and_its_users,
        the_message_of_a_user_who_logged_in_is_kept_once_the_channel_exists,
        an_enrollment_of_another_tenant_is_refused,
        facts_that_a_message_does_not_say_stay,
        last_seen_is_seen_at_once_and_kept_over_a_restart,
        queries_filter_and_page,
        push_targets_are_the_enrolled_ones;
    certificate_bindings:
        a_certificate_belongs_to_one_enrollment,
        an_authenticate_learns_what_is_known_of_it,
        a_new_certificate_replaces_the_old_one_at_commit,
        bindings_survive_a_restart,
        a_rotated_identity_replaces_the_one_before,
        an_identity_is_not_rotated_backwards_or_twice,
        a_device_that_was_moved_here_takes_its_first_certificate;
    push_failures:
        a_failure_is_told_once_for_each_reason_and_ends_with_a_push_that_goes_well,
        a_dead_token_is_left_alone_until_the_device_tells_another,
        what_is_said_of_a_token_that_was_left_behind_counts_for_nothing,
        a_success_that_is_recorded_right_behind_a_failure_ends_it,
        another_unknown_reason_is_told_too;
    renewal:
        an_authenticate_that_a_command_asked_for_is_a_renewal_and_keeps_everything,
        until_the_token_update_behind_it_a_renewal_ends_no_certificate,
        a_device_that_falls_back_from_a_renewal_has_its_certificate_and_may_try_again,
        a_token_update_that_was_late_does_not_end_the_new_certificate,
        whatever_happens_within_a_renewal_one_certificate_stays,
        what_may_be_no_renewal_is_none_within_the_day_either,
        any_other_authenticate_begins_anew,
        a_device_that_is_wiped_within_the_day_comes_back_as_a_new_one,
        a_renewal_that_waits_for_its_configuration_was_a_wipe,
        a_new_certificate_is_refused_where_it_may_not_be,
        a_certificate_is_shared_only_where_bindings_are_watched,
        an_expired_identity_is_offered_renewals_only,
        the_window_of_a_renewal_survives_a_restart;
    user_verdicts:
        what_was_last_said_of_a_user_stands_until_something_else_is_said,
        a_token_that_was_given_is_compared_where_one_is_brought,
        users_that_a_device_makes_up_do_not_push_a_verdict_out;
    wakes:
        a_session_that_leaves_deferred_commands_schedules_a_push,
        a_device_that_comes_by_itself_is_waited_for,
        a_promised_push_survives_a_restart_and_is_one,
        who_left_or_begins_anew_is_not_woken,
        a_wake_waits_for_its_command_and_nopush_means_none,
        a_push_that_failed_for_a_while_is_made_again_soon,
        a_push_that_began_earlier_does_not_answer_what_was_asked_for_since,
        a_session_that_ends_during_a_push_keeps_its_schedule,
        a_later_command_wakes_its_device_in_time_whatever_is_pushed_before,
        a_new_command_does_not_inherit_how_long_the_device_was_silent,
        a_token_that_is_new_is_pushed_to_at_once_if_commands_wait,
        a_push_of_its_own_that_fails_is_made_again_if_commands_wait,
        nobody_is_woken_for_what_was_queued_without_a_push,
        a_deferral_does_not_forget_a_later_command,
        the_same_token_told_again_is_pushed_to_at_once_if_apple_had_missed_it,
        rows_that_nobody_needs_do_not_hold_up_the_others,
        what_a_wrong_clock_put_off_is_due_after_a_restart;
    mass_pushes:
        each_target_is_woken_once_in_its_turn_and_its_end_is_kept,
        what_was_in_flight_at_a_restart_is_pushed_to_again_at_once,
        a_push_answers_everyone_who_asked_for_it,
        a_device_that_comes_by_itself_needs_no_push,
        who_leaves_before_its_turn_is_not_pushed_to,
        a_target_is_given_up_after_a_quarter_of_an_hour,
        a_target_whose_device_comes_in_the_same_moment_has_its_end,
        a_renewed_certificate_brings_forward_what_it_can_push,
        a_push_that_was_under_way_when_its_certificate_was_renewed_counts_if_it_reached_somebody,
        what_became_of_a_mass_push_is_forgotten_after_a_week,
        everyone_is_stored_page_by_page_over_a_restart,
        what_broke_off_in_the_middle_can_be_asked_after;
    commands:
        commands_go_out_in_the_order_of_the_queue,
        a_higher_priority_goes_first,
        an_idle_re_offers_what_was_sent_when_asked_to,
        a_report_offers_what_was_sent_only_if_its_own_answer_was_lost,
        not_now_is_offered_again_by_the_next_idle_only,
        not_now_after_another_delivery_is_no_repetition,
        the_first_final_report_wins,
        a_report_of_an_unknown_command_is_kept_as_an_orphan,
        reports_of_cancelled_and_expired_commands_are_orphans,
        an_unknown_status_is_final,
        nothing_goes_out_before_its_time_or_after_its_end,
        expired_commands_are_found_on_the_way_and_by_the_sweep,
        nothing_goes_out_before_enrollment_or_after_check_out_but_reports_are_stored,
        in_quarantine_only_people_and_the_quarantining_plugin_are_heard,
        an_acknowledged_erase_ends_the_old_queue,
        an_erase_that_was_given_up_and_is_acknowledged_late_ends_the_old_queue_too,
        an_erase_of_an_earlier_enrollment_that_is_acknowledged_late_changes_nothing,
        idempotency_keys_of_an_earlier_enrollment_are_free_again,
        orphan_reports_are_bounded_by_their_bytes,
        orphan_reports_are_bounded_by_device_whoever_its_users_are,
        the_command_whose_report_is_too_large_ends_and_the_queue_goes_on,
        the_same_command_again_changes_nothing,
        the_same_command_again_is_no_success_if_it_will_not_go_out,
        the_same_uuid_with_other_bytes_is_refused,
        an_unknown_target_does_not_fail_the_others,
        an_idempotency_key_is_one_command_per_origin_and_enrollment,
        a_collapse_key_replaces_what_was_not_yet_sent,
        a_malformed_report_errors_only_what_was_sent_to_the_enrollment_or_its_users,
        bodies_and_reports_come_back_to_the_byte,
        a_queue_survives_a_restart;
    events:
        nothing_is_written_without_a_subscription,
        the_life_of_a_device_as_events,
        the_life_of_a_command_as_events,
        topics_filter_by_request_type_and_the_star_leaves_out_raw_ones,
        an_event_keeps_the_enrollment_as_it_was,
        secrets_do_not_stand_in_events,
        clearing_a_queue_tells_of_each_command,
        subscriptions_are_of_one_tenant_and_survive_a_restart;
    outbox:
        deliveries_of_a_device_come_in_order,
        a_leased_partition_is_not_claimed_again_before_its_end,
        a_worker_that_lost_its_lease_changes_nothing,
        a_retry_holds_back_the_partition_and_new_events_do_not_wake_it,
        a_subscriber_gets_its_share_and_those_behind_it_theirs,
        a_partition_with_nothing_left_is_given_back_with_its_last_delivery,
        leases_do_not_outlive_the_owner_of_the_database,
        waking_a_subscriber_ends_its_backoff,
        a_dead_letter_lets_the_partition_go_on_and_can_be_replayed,
        what_is_finished_says_who_handled_it,
        old_deliveries_are_cleared_away_and_dead_ones_kept,
        a_renewed_lease_lasts_longer;
    effects:
        effects_commit_with_the_acknowledgement,
        a_read_that_changed_discards_all_effects,
        a_command_that_finished_meanwhile_is_a_conflict,
        a_quota_is_enforced_at_commit,
        expired_pairs_do_not_count_against_the_quota,
        an_unknown_target_rejects_all_effects,
        a_redelivered_command_with_the_same_key_is_queued_once,
        own_events_come_back_only_when_asked_for,
        an_event_loop_ends,
        a_policy_conflict_stores_nothing,
        tags_and_releases_commit_with_the_acknowledgement;
    timers:
        a_timer_fires_once,
        setting_a_timer_again_moves_it,
        cancelling_withdraws_a_tick_that_waits,
        a_timer_that_changed_meanwhile_is_a_conflict,
        cron_ticks_coalesce_while_one_waits,
        cron_entries_follow_the_manifest;
    plugin_key_values:
        pairs_are_of_one_plugin_and_tenant,
        scans_go_in_byte_order_after_a_key,
        expired_pairs_are_absent_and_cleared_away;
    push_certificates:
        storing_counts_versions_and_owns_the_topic,
        who_stored_a_certificate_stands_in_the_audit,
        a_topic_that_no_device_uses_takes_the_place_of_none_unless_that_is_said,
        an_end_that_comes_nearer_is_told_once_for_each_of_its_days;
    audit:
        decisions_leave_rows_newest_first;
    concurrency:
        two_polls_at_once_send_a_command_once,
        parallel_enqueues_keep_their_order_and_lose_nothing,
        two_workers_never_hold_one_partition;
}
