#pragma once

namespace hestia {

/// Tells the log that stderr's current line holds a progress bar: the next log line clears it first, and the bar is
/// drawn anew below at its next update.
void set_bar_on_screen(bool on_screen);

}  // namespace hestia
